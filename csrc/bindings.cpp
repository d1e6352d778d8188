// The pybind11 module snmf_kernels._C: plain addresses, sizes and strides. It knows nothing of torch; ops.py and
// _backends.py check what they pass. All kernels release the GIL.
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#if defined(SNMF_WITH_CUDA)
#include "cuda.hpp"
#endif

#define SNMF_STRING_(a) #a
#define SNMF_STRING(a) SNMF_STRING_(a)

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

int usable_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads: wanted at least 1, got " + std::to_string(threads));
    return threads;
}

// A call of a kernel, which asks from time to time whether the user has pressed Ctrl-C, and says how far it is.
class Call {
  public:
    explicit Call(PyObject* listener = nullptr) : listener_(listener) {}
    snmf::Interrupt interrupt() { return {&Call::poll, this}; }

    // Runs the kernel without the GIL, and raises what ended it early.
    template <typename Kernel, typename Args>
    void run(Kernel kernel, const Args& args) {
        int status;
        {
            py::gil_scoped_release release;
            status = kernel(args);
        }
        if (status == 2) throw py::error_already_set();
        if (status) throw std::bad_alloc();
    }

  private:
    using Clock = std::chrono::steady_clock;

    // Non-zero once Python has an exception to raise, which stays set. Only Python's main thread hears of signals.
    static int poll(void* context, double done) {
        Call& call = *static_cast<Call*>(context);
        const auto now = Clock::now();
        if (now - call.last_ < std::chrono::milliseconds(50)) return 0;
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals()) return 1;
        if (call.listener_ && call.listener_ != Py_None) {
            PyObject* answer = PyObject_CallFunction(call.listener_, "d", done);
            if (!answer) return 1;
            Py_DECREF(answer);
        }
        call.last_ = Clock::now();
        return 0;
    }

    PyObject* listener_;  // called with the share of the work that is done, if there is one
    Clock::time_point last_ = Clock::now();
};

snmf::DType dtype_of(const std::string& name) {
    if (name == "float32") return snmf::DType::f32;
    if (name == "float64") return snmf::DType::f64;
    if (name == "float16") return snmf::DType::f16;
    if (name == "bfloat16") return snmf::DType::bf16;
    throw std::invalid_argument("dtype: wanted float16, bfloat16, float32 or float64, got " + name);
}

template <typename T>
snmf::Ladder<T> ladder_of(double ridge, int escalations, double floor) {
    return {static_cast<T>(ridge), escalations, static_cast<T>(floor)};
}

// Calls run(T()) with T the working type.
template <typename Run>
void with_type(const std::string& dtype, Run run) {
    switch (dtype_of(dtype)) {
        case snmf::DType::f32: return run(float());
        case snmf::DType::f64: return run(double());
        default: throw std::invalid_argument("dtype: wanted float32 or float64 to compute in, got " + dtype);
    }
}

void sweep(bool multiplicative, const std::string& dtype, Address Y, int64_t ldy, Address ZtA, int64_t ldp, Address ZtZ,
           Address out, int64_t ldo, int64_t k, int64_t n, double eps, int sweeps, int threads) {
    Call call;
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::CoefficientArgs<T> args{at<T>(Y), ldy, at<T>(ZtA), ldp, at<T>(ZtZ), at<T>(out), ldo,
                                            k, n, static_cast<T>(eps), sweeps, usable_threads(threads),
                                            call.interrupt()};
        const auto& kernels = snmf::kernels().of<T>();
        call.run(multiplicative ? kernels.multiplicative_update : kernels.coordinate_descent, args);
    });
}

void winner_take_all(const std::string& dtype, Address Z, int64_t row_stride, int64_t column_stride, int64_t d, int64_t k,
                     int64_t count, Address indices, Address values, int threads) {
    Call call;
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::SelectArgs<T> args{at<T>(Z), row_stride, column_stride, d, k, count,
                                       at<int64_t>(indices), at<T>(values), usable_threads(threads),
                                       call.interrupt()};
        call.run(snmf::kernels().of<T>().winner_take_all, args);
    });
}

void sparse_product(const std::string& dtype, const std::string& a_dtype, Address A, int64_t row_stride,
                    int64_t column_stride, int64_t d, int64_t n, Address indices, Address values, int64_t k,
                    int64_t count, Address starts, Address out, int threads) {
    const snmf::DType a_type = dtype_of(a_dtype);
    Call call;
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::SparseProductArgs<T> args{at<void>(A), a_type, row_stride, column_stride, d, n,
                                              at<int64_t>(indices), at<T>(values), k, count, at<T>(out),
                                              usable_threads(threads), call.interrupt(),
                                              at<int64_t>(starts)};
        call.run(snmf::kernels().of<T>().sparse_product, args);
    });
}

py::tuple coefficient_pass(const std::string& dtype, const std::string& a_dtype, Address A, int64_t row_stride,
                           int64_t column_stride, int64_t d, int64_t n, Address indices, Address values, int64_t k,
                           int64_t count, Address starts, Address ZtZ, Address Y, int64_t ldy, Address out, int64_t ldo, Address row_scale,
                           Address shift, Address token_weights, Address AYt, Address feature_norms, int64_t max_active,
                           Address residual_values, bool multiplicative, int sweeps, double eps, double tol, bool measure, int threads,
                           py::object listener) {
    const snmf::DType a_type = dtype_of(a_dtype);
    double sums[snmf::sum_count];
    Call call(listener.ptr());
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::PassArgs<T> args{at<void>(A), a_type, row_stride, column_stride, d, n,
                                     at<int64_t>(indices), at<T>(values), k, count, at<T>(ZtZ), at<T>(Y), ldy,
                                     at<T>(out), ldo, at<T>(row_scale), at<T>(shift), at<T>(token_weights), at<T>(AYt),
                                     at<T>(feature_norms), max_active, at<T>(residual_values), sums,
                                     static_cast<T>(eps),
                                     static_cast<T>(tol), sweeps, multiplicative, measure, usable_threads(threads),
                                     call.interrupt(), at<int64_t>(starts)};
        call.run(snmf::kernels().of<T>().coefficient_pass, args);
    });
    return py::make_tuple(sums[0], sums[1], sums[2], sums[3], sums[4], static_cast<int>(sums[snmf::sum_sweeps]));
}

void column_descent(const std::string& dtype, Address YYt, Address AYt, Address indices, Address values, int64_t d,
                    int64_t k, int64_t count, int sweeps) {
    Call call;
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::ColumnArgs<T> args{at<T>(YYt), at<T>(AYt), at<int64_t>(indices), at<T>(values),
                                       d, k, count, sweeps, call.interrupt()};
        call.run(snmf::kernels().of<T>().column_descent, args);
    });
}

void support_solve(const std::string& dtype, Address G, Address offsets, Address members, Address B, Address X,
                   Address info, int64_t k, int64_t d, double ridge, int escalations, double floor, int threads) {
    Call call;
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::SupportArgs<T> args{at<T>(G), at<int64_t>(offsets), at<int64_t>(members), at<T>(B), at<T>(X),
                                        at<int32_t>(info), k, d, ladder_of<T>(ridge, escalations, floor),
                                        usable_threads(threads), call.interrupt()};
        call.run(snmf::kernels().of<T>().support_solve, args);
    });
}

void ridge_solve(const std::string& dtype, Address G, Address B, Address X, Address info, int64_t batch, int64_t k,
                 int64_t m, double ridge, int escalations, double floor, int threads) {
    Call call;
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const snmf::RidgeArgs<T> args{at<T>(G), at<T>(B), at<T>(X), at<int32_t>(info), batch, k, m,
                                      ladder_of<T>(ridge, escalations, floor), usable_threads(threads),
                                      call.interrupt()};
        call.run(snmf::kernels().of<T>().ridge_solve, args);
    });
}

#if defined(SNMF_WITH_CUDA)
void check_cuda(const char* operation, int device, const char* error) {
    if (error)
        throw std::runtime_error(std::string(operation) + " on CUDA device " + std::to_string(device) + ": " + error);
}

void cuda_ridge_solve(const std::string& dtype, Address G, Address B, Address X, Address info, int64_t batch, int64_t k,
                      int64_t m, double ridge, int escalations, double floor, int device, Address stream) {
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const char* error;
        {
            py::gil_scoped_release release;
            error = snmf::cuda::ridge_solve<T>(at<T>(G), at<T>(B), at<T>(X), at<int32_t>(info), batch, k, m,
                                               ladder_of<T>(ridge, escalations, floor), device, stream);
        }
        check_cuda("ridge_solve", device, error);
    });
}

void cuda_support_solve(const std::string& dtype, Address G, Address offsets, Address members, Address B, Address X,
                        Address info, int64_t k, int64_t d, int64_t member_count, double ridge, int escalations,
                        double floor, Address workspace, int device, Address stream) {
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const char* error;
        {
            py::gil_scoped_release release;
            error = snmf::cuda::support_solve<T>(at<T>(G), at<int64_t>(offsets), at<int64_t>(members), at<T>(B), at<T>(X),
                                                 at<int32_t>(info), k, d, member_count,
                                                 ladder_of<T>(ridge, escalations, floor), at<void>(workspace), device,
                                                 stream);
        }
        check_cuda("support_solve", device, error);
    });
}
#endif

py::dict build_info() {
    py::dict info;
    info["version"] = SNMF_STRING(SNMF_VERSION);
    info["compiler"] = SNMF_STRING(SNMF_COMPILER);
    info["levels"] = snmf::supported_levels();
    info["level"] = snmf::kernels().name;
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#if defined(SNMF_WITH_CUDA)
    info["cuda"] = SNMF_STRING(SNMF_CUDA_VERSION);
    info["cuda_architectures"] = SNMF_STRING(SNMF_CUDA_ARCHITECTURES);
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = "";
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of snmf_kernels. Addresses and strides are not checked: use snmf_kernels.ops.";
    module.def("build_info", &build_info, "Facts about this build and the instruction level in use.");
    module.def(
        "set_level",
        [](const std::string& name) {
            if (!snmf::set_level(name.c_str()))
                throw py::value_error("level: wanted one of " + std::string(snmf::supported_levels()) +
                                      ", got '" + name + "'");
        },
        py::arg("name"), "Use the CPU kernels of this instruction level from now on, in the whole process.");

    using namespace py::literals;
    module.def(
        "multiplicative_update",
        [](const std::string& dtype, Address Y, int64_t ldy, Address ZtA, int64_t ldp, Address ZtZ, Address out, int64_t ldo,
           int64_t k, int64_t n, double eps, int sweeps, int threads) {
            sweep(true, dtype, Y, ldy, ZtA, ldp, ZtZ, out, ldo, k, n, eps, sweeps, threads);
        },
        "dtype"_a, "Y"_a, "ldy"_a, "ZtA"_a, "ldp"_a, "ZtZ"_a, "out"_a, "ldo"_a, "k"_a, "n"_a, "eps"_a, "sweeps"_a,
        "threads"_a);
    module.def(
        "coordinate_descent",
        [](const std::string& dtype, Address Y, int64_t ldy, Address ZtA, int64_t ldp, Address ZtZ, Address out, int64_t ldo,
           int64_t k, int64_t n, int sweeps, int threads) {
            sweep(false, dtype, Y, ldy, ZtA, ldp, ZtZ, out, ldo, k, n, 0.0, sweeps, threads);
        },
        "dtype"_a, "Y"_a, "ldy"_a, "ZtA"_a, "ldp"_a, "ZtZ"_a, "out"_a, "ldo"_a, "k"_a, "n"_a, "sweeps"_a, "threads"_a);
    module.def("winner_take_all", &winner_take_all, "dtype"_a, "Z"_a, "row_stride"_a, "column_stride"_a, "d"_a, "k"_a,
               "count"_a, "indices"_a, "values"_a, "threads"_a);
    module.def("sparse_product", &sparse_product, "dtype"_a, "a_dtype"_a, "A"_a, "row_stride"_a, "column_stride"_a, "d"_a,
               "n"_a, "indices"_a, "values"_a, "k"_a, "count"_a, "starts"_a, "out"_a, "threads"_a);
    module.def("coefficient_pass", &coefficient_pass, "dtype"_a, "a_dtype"_a, "A"_a, "row_stride"_a, "column_stride"_a,
               "d"_a, "n"_a, "indices"_a, "values"_a, "k"_a, "count"_a, "starts"_a, "ZtZ"_a, "Y"_a, "ldy"_a, "out"_a, "ldo"_a, "row_scale"_a,
               "shift"_a, "token_weights"_a, "AYt"_a, "feature_norms"_a, "max_active"_a,
               "residual_values"_a, "multiplicative"_a, "sweeps"_a, "eps"_a,
               "tol"_a, "measure"_a, "threads"_a, "listener"_a,
               "Returns the sums of kernels.hpp. Optional addresses are 0 for none, and a listener that is not None is "
               "called now and then with the share of the work that is done.");
    module.def("column_descent", &column_descent, "dtype"_a, "YYt"_a, "AYt"_a, "indices"_a, "values"_a, "d"_a, "k"_a,
               "count"_a, "sweeps"_a);
    module.def("support_solve", &support_solve, "dtype"_a, "G"_a, "offsets"_a, "members"_a, "B"_a, "X"_a, "info"_a, "k"_a,
               "d"_a, "ridge"_a, "escalations"_a, "floor"_a, "threads"_a);
    module.def("ridge_solve", &ridge_solve, "dtype"_a, "G"_a, "B"_a, "X"_a, "info"_a, "batch"_a, "k"_a, "m"_a, "ridge"_a,
               "escalations"_a, "floor"_a, "threads"_a);
#if defined(SNMF_WITH_CUDA)
    module.def("cuda_device_count", &snmf::cuda::device_count);
    module.def("cuda_ridge_max_k", &snmf::cuda::ridge_max_k, "device"_a, "element_size"_a);
    module.def("cuda_ridge_solve", &cuda_ridge_solve, "dtype"_a, "G"_a, "B"_a, "X"_a, "info"_a, "batch"_a, "k"_a, "m"_a,
               "ridge"_a, "escalations"_a, "floor"_a, "device"_a, "stream"_a);
    module.def("cuda_support_workspace", &snmf::cuda::support_workspace, "k"_a, "d"_a, "member_count"_a, "device"_a,
               "element_size"_a);
    module.def("cuda_support_solve", &cuda_support_solve, "dtype"_a, "G"_a, "offsets"_a, "members"_a, "B"_a, "X"_a, "info"_a,
               "k"_a, "d"_a, "member_count"_a, "ridge"_a, "escalations"_a, "floor"_a, "workspace"_a, "device"_a, "stream"_a);
#else
    module.def("cuda_device_count", [] { return 0; });
#endif
}
