// CUDA launchers of the regularised solve: one warp per system up to k = 32, one block with the factor in
// shared memory above. A system with many right-hand sides is spread over several groups, each of which
// factorises it anew: the factor of a system that fits shared memory costs less than passing it on.
#include <cuda_runtime.h>

#include "cuda.hpp"
#include "ridge.hpp"

namespace snmf::cuda {
namespace {

constexpr int warp_size = 32;
constexpr int warps_per_block = 4;       // warp-per-system kernel
constexpr int64_t max_warp_k = 32;
constexpr int64_t max_columns = 64;      // right-hand sides of one group

struct WarpGroup {
    __device__ int lane() const { return threadIdx.x % warp_size; }
    __device__ int lanes() const { return warp_size; }
    __device__ int team() const { return 0; }
    __device__ int teams() const { return 1; }
    __device__ void team_sync() const { __syncwarp(); }
    __device__ void sync() const { __syncwarp(); }
};

struct BlockGroup {
    __device__ int lane() const { return threadIdx.x % warp_size; }
    __device__ int lanes() const { return warp_size; }
    __device__ int team() const { return threadIdx.x / warp_size; }
    __device__ int teams() const { return blockDim.x / warp_size; }
    __device__ void team_sync() const { __syncwarp(); }
    __device__ void sync() const { __syncthreads(); }
};

extern __shared__ __align__(16) unsigned char shared_memory[];

template <typename T, typename Group>
__global__ void ridge_kernel(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int k, int64_t m, int columns,
                             int64_t tiles, T ridge) {
    constexpr bool per_warp = __is_same(Group, WarpGroup);
    const int64_t item = per_warp ? static_cast<int64_t>(blockIdx.x) * warps_per_block + threadIdx.x / warp_size
                                  : static_cast<int64_t>(blockIdx.x);
    if (item >= batch * tiles) return;  // uniform over the group
    const int64_t system = item / tiles, first = item % tiles * columns;
    const int width = static_cast<int>(m - first < columns ? m - first : columns);
    T* workspace = reinterpret_cast<T*>(shared_memory);
    if (per_warp) workspace += threadIdx.x / warp_size * ridge_workspace(k, columns);
    Group group;
    const int failed = ridge_solve_group(group, G + system * k * k, B + system * k * m + first,
                                         X + system * k * m + first, k, m, width, ridge, workspace);
    if (first == 0 && group.team() == 0 && group.lane() == 0) info[system] = failed;
}

int64_t shared_limit(int device) {
    int bytes = 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    return bytes;
}

// Puts the calling thread's device back: torch's own runtime shares the thread's current context with this one.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        error_ = cudaGetDevice(&previous_);
        if (error_ == cudaSuccess && previous_ != device) {
            error_ = cudaSetDevice(device);
            changed_ = error_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    cudaError_t error() const { return error_; }

  private:
    int previous_ = 0;
    bool changed_ = false;
    cudaError_t error_;
};

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename T, typename Group>
const char* launch(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int64_t k, int64_t m, int64_t columns,
                   T ridge, int threads, int groups_per_block, int64_t limit, cudaStream_t stream) {
    const int64_t tiles = (m + columns - 1) / columns;
    const int64_t blocks = (batch * tiles + groups_per_block - 1) / groups_per_block;
    const int64_t bytes = ridge_workspace(k, columns) * static_cast<int64_t>(sizeof(T)) * groups_per_block;
    if (bytes > limit) return "the system does not fit shared memory";
    if (blocks > INT32_MAX) return "too many systems for one launch";
    const auto kernel = ridge_kernel<T, Group>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return text_of(error);
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(G, B, X, info, batch, static_cast<int>(k), m,
                                                                      static_cast<int>(columns), tiles, ridge);
    return text_of(cudaGetLastError());
}

}  // namespace

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // clears the error, so that it does not surface in somebody else's check
        return 0;
    }
    return count;
}

int64_t ridge_max_k(int device, int element_size) {
    const int64_t elements = shared_limit(device) / element_size;
    int64_t k = 0;
    while (ridge_workspace(k + 1, 1) <= elements) ++k;
    return k;
}

template <typename T>
const char* ridge_solve(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int64_t k, int64_t m, T ridge,
                        int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return text_of(guard.error());
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    if (batch == 0) return nullptr;
    if (k == 0 || m == 0) return text_of(cudaMemsetAsync(info, 0, static_cast<size_t>(batch) * sizeof(int32_t), on));
    const int64_t limit = shared_limit(device);
    int64_t columns = m < max_columns ? m : max_columns;
    if (k <= max_warp_k) {
        if (columns > warp_size) columns = warp_size;
        return launch<T, WarpGroup>(G, B, X, info, batch, k, m, columns, ridge, warps_per_block * warp_size,
                                    warps_per_block, limit, on);
    }
    while (columns > 1 && ridge_workspace(k, columns) * static_cast<int64_t>(sizeof(T)) > limit) columns /= 2;
    const int threads = k <= 64 ? 128 : k <= 128 ? 256 : 512;
    return launch<T, BlockGroup>(G, B, X, info, batch, k, m, columns, ridge, threads, 1, limit, on);
}

template const char* ridge_solve<float>(const float*, const float*, float*, int32_t*, int64_t, int64_t, int64_t, float,
                                        int, uintptr_t);
template const char* ridge_solve<double>(const double*, const double*, double*, int32_t*, int64_t, int64_t, int64_t,
                                         double, int, uintptr_t);

}  // namespace snmf::cuda
