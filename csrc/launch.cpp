// Launches of compiled kernels without the launcher's work on the host: a callable holds the packed parameters, and a
// call fills in the tensors' addresses. The driver is loaded when first used, so this builds and imports without CUDA.
#include "sadp/launch.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace py = pybind11;

namespace sadp {
namespace {

// The few declarations of cuda.h that are needed.
using Result = int;
using Function = void*;
using Context = void*;
using Stream = void*;

struct Attribute {
    int id;
    alignas(8) unsigned char value[64];
};
constexpr int kProgrammaticStreamSerialization = 6;

struct Config {
    unsigned grid[3], block[3], shared;
    Stream stream;
    Attribute* attributes;
    unsigned attribute_count;
};

struct Driver {
    Result (*launch)(const Config*, Function, void**, void**);
    Result (*parameter)(Function, size_t, size_t*, size_t*);
    Result (*current)(Context*);
    Result (*push)(Context);
    Result (*pop)(Context*);
    Result (*error_name)(Result, const char**);
    bool complete = false;

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_LAZY);
        if (library == nullptr) return;
        const auto load = [library](auto& function, const char* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            return function != nullptr;
        };
        complete = load(launch, "cuLaunchKernelEx") && load(parameter, "cuFuncGetParamInfo") &&  // CUDA 12.4
                   load(current, "cuCtxGetCurrent") && load(push, "cuCtxPushCurrent_v2") &&
                   load(pop, "cuCtxPopCurrent_v2") && load(error_name, "cuGetErrorName");
    }
};

const Driver& driver() {
    static const Driver instance;
    return instance;
}

constexpr size_t kMaxTensors = 32;  // bits of the alignment mask
constexpr size_t kMaxParameters = 64;
constexpr size_t kMaxBytes = 512;
constexpr uintptr_t kAlignment = 16;  // what the compiler specialises pointers on

struct Launch {
    Function function;
    Context context;
    unsigned programs, threads, shared;
    bool early;        // may come up before the kernel in front of it on the stream has ended: it waits by itself
    uint32_t aligned;  // bit i: tensor i lies at a multiple of 16 bytes
    size_t tensors;
    std::vector<size_t> offsets;
    std::vector<unsigned char> bytes;
};

Result launch_with(const Launch& plan, unsigned char* bytes, Stream stream) {
    void* parameters[kMaxParameters];
    for (size_t i = 0; i < plan.offsets.size(); ++i) parameters[i] = bytes + plan.offsets[i];
    const Driver& cuda = driver();
    Context current = nullptr;
    cuda.current(&current);
    const bool elsewhere = current != plan.context;  // another device, or a thread that has not used CUDA yet
    if (elsewhere) cuda.push(plan.context);
    Attribute attribute = {kProgrammaticStreamSerialization, {}};
    const int allowed = 1;
    std::memcpy(attribute.value, &allowed, sizeof allowed);
    const Config config = {{plan.programs, 1, 1}, {plan.threads, 1, 1}, plan.shared, stream, &attribute,
                           plan.early ? 1u : 0u};
    const Result result = cuda.launch(&config, plan.function, parameters, nullptr);
    if (elsewhere) cuda.pop(&current);
    return result;
}

// (stream, *tensors) -> whether it was launched: not if a tensor is aligned otherwise than those it was compiled for.
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    const auto& plan = *static_cast<const Launch*>(PyCapsule_GetPointer(self, nullptr));
    if (static_cast<size_t>(count) != plan.tensors + 1) {
        return PyErr_Format(PyExc_TypeError, "this kernel takes a stream and %zu tensors, got %zd arguments",
                            plan.tensors, count);
    }
    void* const stream = PyLong_AsVoidPtr(arguments[0]);
    alignas(8) unsigned char bytes[kMaxBytes];  // a copy: other threads may launch the same plan
    std::memcpy(bytes, plan.bytes.data(), plan.bytes.size());
    uint32_t aligned = 0;
    for (size_t i = 0; i < plan.tensors; ++i) {
        PyObject* const address = PyObject_CallMethodNoArgs(arguments[i + 1], data_ptr);
        if (address == nullptr) return nullptr;
        const auto pointer = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(address));
        Py_DECREF(address);
        std::memcpy(bytes + plan.offsets[i], &pointer, sizeof pointer);
        aligned |= static_cast<uint32_t>(pointer % kAlignment == 0) << i;
    }
    if (PyErr_Occurred()) return nullptr;
    if (aligned != plan.aligned) Py_RETURN_FALSE;
    Result result;
    Py_BEGIN_ALLOW_THREADS;  // a full launch queue blocks
    result = launch_with(plan, bytes, stream);
    Py_END_ALLOW_THREADS;
    if (result != 0) {
        const char* name = nullptr;
        driver().error_name(result, &name);
        return PyErr_Format(PyExc_RuntimeError, "the kernel launch failed: %s (%d)", name ? name : "unknown", result);
    }
    Py_RETURN_TRUE;
}

PyMethodDef call_definition = {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                               METH_FASTCALL, "launch(stream, *tensors) -> bool"};

// The callable, or None where the function's parameters are not the ones given.
py::object prepare(uintptr_t function, unsigned programs, unsigned threads, unsigned shared, bool early,
                   uint32_t aligned, size_t tensors, const std::vector<std::string>& parameters) {
    const Driver& cuda = driver();
    if (!cuda.complete || tensors > kMaxTensors || parameters.size() + 2 > kMaxParameters) return py::none();
    auto plan = std::make_unique<Launch>();
    plan->function = reinterpret_cast<Function>(function);
    plan->programs = programs;
    plan->threads = threads;
    plan->shared = shared;
    plan->early = early;
    plan->aligned = aligned;
    plan->tensors = tensors;
    if (cuda.current(&plan->context) != 0 || plan->context == nullptr) return py::none();
    size_t offset = 0, size = 0, i = 0;
    for (; cuda.parameter(plan->function, i, &offset, &size) == 0; ++i) {
        const bool ours = i < parameters.size();
        // After ours the compiler appends up to two pointers to scratch memory, which no kernel of ours needs.
        const size_t expected = ours ? parameters[i].size() : sizeof(void*);
        if (size != expected || i >= parameters.size() + 2 || offset + size > kMaxBytes) return py::none();
        plan->bytes.resize(offset + size, 0);
        if (ours) std::memcpy(plan->bytes.data() + offset, parameters[i].data(), size);
        plan->offsets.push_back(offset);
    }
    if (i < parameters.size()) return py::none();
    PyObject* capsule = PyCapsule_New(plan.release(), nullptr, [](PyObject* self) {
        delete static_cast<Launch*>(PyCapsule_GetPointer(self, nullptr));
    });
    if (capsule == nullptr) throw py::error_already_set();
    const py::object owner = py::reinterpret_steal<py::object>(capsule);
    PyObject* function_object = PyCFunction_New(&call_definition, capsule);
    if (function_object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function_object);
}

}  // namespace

void bind_launch(py::module_& module) {
    module.def("prepare_launch", &prepare, py::arg("function"), py::arg("programs"), py::arg("threads"),
               py::arg("shared"), py::arg("early"), py::arg("aligned"), py::arg("tensors"), py::arg("parameters"));
}

}  // namespace sadp
