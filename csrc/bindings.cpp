// The sampling library as Python sees it. Tensors come as raw pointers, streams as handles, so that no torch header is
// needed and one build serves every torch; sadp_fast/prune owns the tensors and has checked them.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "sadp/inclusion.h"
#include "sadp/launch.h"
#include "sadp/sample.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

sadp::Probabilities probabilities(std::uintptr_t p, bool is_double, int64_t n) {
    return {pointer<const void>(p), is_double, n};
}

#ifdef SADP_WITH_CUDA
sadp::cuda::Draw cuda_draw(std::uintptr_t p, bool is_double, int64_t n, uint64_t seed, int64_t epoch,
                           std::uintptr_t epoch_pointer, int device, std::uintptr_t workspace, std::uintptr_t stream) {
    return {probabilities(p, is_double, n),
            {seed, static_cast<uint64_t>(epoch)},
            pointer<const int64_t>(epoch_pointer),
            device,
            pointer<void>(workspace),
            pointer<void>(stream)};
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native part of sadp_fast: Bernoulli subset sampling and kernel launches.";
    sadp::bind_launch(module);
    module.attr("SOURCES_DIGEST") = SADP_SOURCES_DIGEST;  // of what it was built from; sadp_fast/native.py compares it
    module.attr("MAX_ITEMS") = sadp::kMaxItems;
    module.attr("NO_INVALID") = sadp::kNoInvalid;
#ifdef SADP_WITH_CUDA
    module.attr("has_cuda") = true;
#else
    module.attr("has_cuda") = false;
#endif

    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<sadp::cpu::Selection>(module, "Selection")
        .def_readonly("count", &sadp::cpu::Selection::count)
        .def_readonly("invalid", &sadp::cpu::Selection::invalid);
    module.def("cpu_workspace", &sadp::cpu::workspace_size, py::arg("n"));
    module.def(
        "cpu_select",
        [](std::uintptr_t p, bool is_double, int64_t n, uint64_t seed, int64_t epoch, int threads,
           std::uintptr_t workspace) {
            return sadp::cpu::select(probabilities(p, is_double, n), {seed, static_cast<uint64_t>(epoch)}, threads,
                                     pointer<uint64_t>(workspace));
        },
        py::arg("p"), py::arg("is_double"), py::arg("n"), py::arg("seed"), py::arg("epoch"), py::arg("threads"),
        py::arg("workspace"), Release());
    module.def(
        "cpu_write",
        [](std::uintptr_t p, bool is_double, int64_t n, const sadp::cpu::Selection& selection, int threads,
           std::uintptr_t workspace, std::uintptr_t indices, std::uintptr_t weights, int64_t capacity) {
            sadp::cpu::write(probabilities(p, is_double, n), selection, threads, pointer<const uint64_t>(workspace),
                             {pointer<int64_t>(indices), pointer<float>(weights), capacity});
        },
        py::arg("p"), py::arg("is_double"), py::arg("n"), py::arg("selection"), py::arg("threads"),
        py::arg("workspace"), py::arg("indices"), py::arg("weights"), py::arg("capacity"), Release());

#ifdef SADP_WITH_CUDA
    py::class_<sadp::cuda::Shape>(module, "Shape")
        .def(py::init<int64_t, int, bool>(), py::arg("blocks"), py::arg("room"), py::arg("cooperative"))
        .def_readonly("blocks", &sadp::cuda::Shape::blocks)
        .def_readonly("room", &sadp::cuda::Shape::room)
        .def_readonly("cooperative", &sadp::cuda::Shape::cooperative);
    module.def("cuda_shape", &sadp::cuda::shape, py::arg("n"), py::arg("device"));
    module.def("cuda_workspace", &sadp::cuda::workspace_size, py::arg("n"), py::arg("blocks"));
    module.def(
        "cuda_draw",
        [](std::uintptr_t p, bool is_double, int64_t n, uint64_t seed, int64_t epoch, std::uintptr_t epoch_pointer,
           int device, std::uintptr_t workspace, std::uintptr_t stream, const sadp::cuda::Shape& shape,
           std::uintptr_t indices, std::uintptr_t weights, int64_t capacity, std::uintptr_t count) {
            sadp::cuda::draw(cuda_draw(p, is_double, n, seed, epoch, epoch_pointer, device, workspace, stream), shape,
                             {pointer<int64_t>(indices), pointer<float>(weights), capacity}, pointer<int64_t>(count));
        },
        Release());
    module.def(
        "cuda_select",
        [](std::uintptr_t p, bool is_double, int64_t n, uint64_t seed, int64_t epoch, std::uintptr_t epoch_pointer,
           int device, std::uintptr_t workspace, std::uintptr_t stream, const sadp::cuda::Shape& shape) {
            sadp::cuda::select(cuda_draw(p, is_double, n, seed, epoch, epoch_pointer, device, workspace, stream),
                               shape);
        },
        Release());
    module.def(
        "cuda_totals",
        [](std::uintptr_t workspace, int64_t blocks) {
            const sadp::cuda::Drawn drawn = sadp::cuda::totals(pointer<const void>(workspace), blocks);
            return py::make_tuple(drawn.count, drawn.invalid);
        },
        py::arg("workspace"), py::arg("blocks"));
    module.def(
        "cuda_write",
        [](std::uintptr_t p, bool is_double, int64_t n, uint64_t seed, int64_t epoch, std::uintptr_t epoch_pointer,
           int device, std::uintptr_t workspace, std::uintptr_t stream, const sadp::cuda::Shape& shape,
           std::uintptr_t indices, std::uintptr_t weights, int64_t capacity, std::uintptr_t count) {
            sadp::cuda::write(cuda_draw(p, is_double, n, seed, epoch, epoch_pointer, device, workspace, stream), shape,
                              {pointer<int64_t>(indices), pointer<float>(weights), capacity}, pointer<int64_t>(count));
        },
        Release());

    module.def("cuda_inclusion_blocks", &sadp::cuda::inclusion_blocks, py::arg("n"), py::arg("device"));
    module.def("cuda_inclusion_workspace", &sadp::cuda::inclusion_workspace_size, py::arg("blocks"));
    module.def(
        "cuda_inclusion",
        [](std::uintptr_t scores, int64_t n, double keep, double unknown_cost, double too_many_unknown, double uniform,
           double floor, double lowest, double optimum_share, double added, std::uintptr_t p, int device,
           int64_t blocks, std::uintptr_t workspace, std::uintptr_t stream) {
            const auto rounded = [](double x) { return static_cast<float>(x); };
            sadp::cuda::inclusion(
                {pointer<const float>(scores), n, keep, unknown_cost, too_many_unknown, rounded(uniform),
                 rounded(floor), rounded(lowest), added > 0, rounded(optimum_share), rounded(added)},
                pointer<float>(p), device, blocks, pointer<void>(workspace), pointer<void>(stream));
        },
        Release());
#endif
}
