// The sampling library as Python sees it. Tensors come as raw pointers, streams as handles, so that no torch header is
// needed and one build serves every torch; sadp_fast/sampling.py owns the tensors and has checked them.
#include <pybind11/pybind11.h>

#include <cstdint>

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

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native part of sadp_fast: Bernoulli subset sampling and kernel launches.";
    sadp::bind_launch(module);
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
    module.def(
        "cuda_plan",
        [](int64_t n) {
            const sadp::cuda::Plan plan = sadp::cuda::plan(n);
            return py::make_tuple(plan.workspace, plan.blocks);
        },
        py::arg("n"));
    module.def(
        "cuda_select",
        [](std::uintptr_t p, bool is_double, int64_t n, uint64_t seed, int64_t epoch, std::uintptr_t epoch_pointer,
           std::uintptr_t workspace, int64_t blocks, std::uintptr_t stream) {
            sadp::cuda::select(probabilities(p, is_double, n), {seed, static_cast<uint64_t>(epoch)},
                               pointer<const int64_t>(epoch_pointer), pointer<void>(workspace), blocks,
                               pointer<void>(stream));
        },
        py::arg("p"), py::arg("is_double"), py::arg("n"), py::arg("seed"), py::arg("epoch"), py::arg("epoch_pointer"),
        py::arg("workspace"), py::arg("blocks"), py::arg("stream"), Release());
    module.def(
        "cuda_write",
        [](std::uintptr_t p, bool is_double, int64_t n, std::uintptr_t workspace, int64_t blocks,
           std::uintptr_t indices, std::uintptr_t weights, int64_t capacity, std::uintptr_t count,
           std::uintptr_t stream) {
            sadp::cuda::write(probabilities(p, is_double, n), pointer<const void>(workspace), blocks,
                              {pointer<int64_t>(indices), pointer<float>(weights), capacity}, pointer<int64_t>(count),
                              pointer<void>(stream));
        },
        py::arg("p"), py::arg("is_double"), py::arg("n"), py::arg("workspace"), py::arg("blocks"), py::arg("indices"),
        py::arg("weights"), py::arg("capacity"), py::arg("count"), py::arg("stream"), Release());
#endif
}
