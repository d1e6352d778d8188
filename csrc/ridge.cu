// CUDA launchers of the regularised solves: one warp per system up to k = 32, one block with the factor in
// shared memory above.
//
// Batched: a system with many right-hand sides is spread over several groups, each of which factorises it anew: the
// factor of a system that fits shared memory costs less than passing it on.
//
// Ragged: only the device knows the sizes. A warp for each neuron solves its system if it is small and lists it
// otherwise; then, for each class of larger sizes, as many blocks as are resident at once take turns at its list.
// Blocks for all neurons, of which those of another class return, would occupy a multiprocessor each, shared memory
// and all, in order to do nothing. Systems beyond shared memory have their factor in a bounded number of global slots.
#include <cuda_runtime.h>

#include "cuda.hpp"
#include "plan.hpp"

namespace snmf::cuda {
namespace {

constexpr int warp_size = 32;
constexpr int warps_per_block = 4;       // warp-per-system kernel
constexpr int64_t max_columns = 64;      // right-hand sides of one group

struct WarpGroup {
    __device__ int lane() const { return threadIdx.x % warp_size; }
    __device__ int lanes() const { return warp_size; }
    __device__ int team() const { return 0; }
    __device__ int teams() const { return 1; }
    __device__ void team_sync() const { __syncwarp(); }
    __device__ void sync() const { __syncwarp(); }
    __device__ int32_t take(int32_t* counter) const { return atomicAdd(counter, 1); }
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
                             int64_t tiles, Ladder<T> ladder) {
    constexpr bool per_warp = __is_same(Group, WarpGroup);
    const int64_t item = per_warp ? static_cast<int64_t>(blockIdx.x) * warps_per_block + threadIdx.x / warp_size
                                  : static_cast<int64_t>(blockIdx.x);
    if (item >= batch * tiles) return;  // uniform over the group
    const int64_t system = item / tiles, first = item % tiles * columns;
    const int width = static_cast<int>(m - first < columns ? m - first : columns);
    T* workspace = reinterpret_cast<T*>(shared_memory);
    if (per_warp) workspace += threadIdx.x / warp_size * ridge_workspace(k, columns);
    Group group;
    const int64_t corner = system * k * m + first;
    const DenseSystem<T> dense{G + system * k * k, B + corner, X + corner, k, width, m};
    const int found = ridge_solve_group(group, dense, ladder, workspace);
    if (first == 0 && group.team() == 0 && group.lane() == 0) info[system] = found;
}

template <typename T>
__global__ void support_warp_kernel(SupportBatch<T> batch, int64_t d, SizeClasses classes, int32_t* counts,
                                    int32_t* lists, Ladder<T> ladder) {
    const int warp = threadIdx.x / warp_size;
    const int64_t neuron = static_cast<int64_t>(blockIdx.x) * warps_per_block + warp;
    if (neuron >= d) return;  // uniform over the warp
    T* workspace = reinterpret_cast<T*>(shared_memory) + warp * ridge_workspace(classes.limit[0], 1);
    WarpGroup group;
    support_solve_or_list(group, batch, neuron, classes, counts, lists, ladder, workspace);
}

// With the factor in shared memory, or in this block's slot of global memory. Left to choose, the compiler would spill
// for more blocks to a multiprocessor than these.
template <typename T, bool in_shared>
__global__ void __launch_bounds__(in_shared ? max_threads : slot_threads, in_shared ? 2 : 1)
    support_block_kernel(SupportBatch<T> batch, const int32_t* list, const int32_t* count, Ladder<T> ladder, T* slots,
                         int64_t slot_elements) {
    T* workspace = in_shared ? reinterpret_cast<T*>(shared_memory) : slots + blockIdx.x * slot_elements;
    BlockGroup group;
    support_solve_listed(group, batch, list, *count, blockIdx.x, gridDim.x, ladder, workspace);
}

// Clears the error, so that the check after the next launch does not find it.
bool succeeded(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess;
}

const char* text_of(cudaError_t error) { return succeeded(error) ? nullptr : cudaGetErrorString(error); }

int64_t attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    return succeeded(cudaDeviceGetAttribute(&value, name, device)) ? value : 0;
}

DeviceLimits limits_of(int device) {
    return {attribute(cudaDevAttrMultiProcessorCount, device),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
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

// The same for every launch of a kernel: a smaller one, asked for by another thread meanwhile, would not do.
template <typename Kernel>
const char* allow_shared(Kernel kernel, int64_t limit) {
    return text_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)));
}

template <typename T, typename Group>
const char* launch(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int64_t k, int64_t m, int64_t columns,
                   const Ladder<T>& ladder, int threads, int groups_per_block, int64_t limit, cudaStream_t stream) {
    const int64_t tiles = (m + columns - 1) / columns;
    const int64_t blocks = (batch * tiles + groups_per_block - 1) / groups_per_block;
    const int64_t bytes = ridge_workspace(k, columns) * static_cast<int64_t>(sizeof(T)) * groups_per_block;
    if (bytes > limit) return "the system does not fit shared memory";
    if (blocks > INT32_MAX) return "too many systems for one launch";
    const auto kernel = ridge_kernel<T, Group>;
    if (const auto error = allow_shared(kernel, limit)) return error;
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(G, B, X, info, batch, static_cast<int>(k), m,
                                                                      static_cast<int>(columns), tiles, ladder);
    return text_of(cudaGetLastError());
}

}  // namespace

int device_count() {
    int count = 0;
    return succeeded(cudaGetDeviceCount(&count)) ? count : 0;
}

int64_t ridge_max_k(int device, int element_size) {
    return largest_in_shared(limits_of(device), element_size);
}

template <typename T>
const char* ridge_solve(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int64_t k, int64_t m,
                        const Ladder<T>& ladder, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return text_of(guard.error());
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    if (batch == 0) return nullptr;
    if (k == 0 || m == 0) return text_of(cudaMemsetAsync(info, 0, static_cast<size_t>(batch) * sizeof(int32_t), on));
    const int64_t limit = limits_of(device).shared_per_block;
    int64_t columns = m < max_columns ? m : max_columns;
    if (k <= max_warp_k) {
        if (columns > warp_size) columns = warp_size;
        return launch<T, WarpGroup>(G, B, X, info, batch, k, m, columns, ladder, warps_per_block * warp_size,
                                    warps_per_block, limit, on);
    }
    while (columns > 1 && ridge_workspace(k, columns) * static_cast<int64_t>(sizeof(T)) > limit) columns /= 2;
    return launch<T, BlockGroup>(G, B, X, info, batch, k, m, columns, ladder, threads_for(k), 1, limit, on);
}

int64_t support_workspace(int64_t k, int64_t d, int64_t members, int device, int element_size) {
    return SupportPlan(k, d, members, limits_of(device), element_size).bytes;
}

template <typename T>
const char* support_solve(const T* G, const int64_t* offsets, const int64_t* members, const T* B, T* X, int32_t* info,
                          int64_t k, int64_t d, int64_t member_count, const Ladder<T>& ladder, void* workspace,
                          int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return text_of(guard.error());
    if (d == 0) return nullptr;
    if (d > INT32_MAX) return "too many neurons for one launch";
    if (k > max_packed_k) return "the systems are too large for 32-bit places in a factor";
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    const DeviceLimits limits = limits_of(device);
    const SupportPlan plan(k, d, member_count, limits, sizeof(T));
    char* memory = static_cast<char*>(workspace);
    auto* counts = reinterpret_cast<int32_t*>(memory);
    auto* lists = reinterpret_cast<int32_t*>(memory + plan.lists_at);
    auto* slots = reinterpret_cast<T*>(memory + plan.slots_at);
    const SupportBatch<T> batch{G, k, offsets, members, B, X, info};
    cudaError_t error = cudaMemsetAsync(counts, 0, size_classes * sizeof(int32_t), on);
    if (error != cudaSuccess) return text_of(error);
    const int64_t warp_bytes = warps_per_block * workspace_bytes(plan.classes.limit[0], sizeof(T));
    const int64_t warp_blocks = (d + warps_per_block - 1) / warps_per_block;
    support_warp_kernel<T><<<static_cast<unsigned>(warp_blocks), warps_per_block * warp_size, warp_bytes, on>>>(
        batch, d, plan.classes, counts, lists, ladder);
    const auto in_shared = support_block_kernel<T, true>;
    if (const auto failed = allow_shared(in_shared, limits.shared_per_block)) return failed;
    error = cudaGetLastError();
    for (int c = 1; c < size_classes && error == cudaSuccess; ++c) {
        if (plan.blocks[c] == 0) continue;
        const auto blocks = static_cast<unsigned>(plan.blocks[c]);
        const int32_t* list = lists + plan.classes.first[c];
        const int64_t size = plan.classes.limit[c];
        if (c + 1 < size_classes)
            in_shared<<<blocks, threads_for(size), workspace_bytes(size, sizeof(T)), on>>>(batch, list, counts + c,
                                                                                           ladder, nullptr, 0);
        else
            support_block_kernel<T, false><<<blocks, slot_threads, 0, on>>>(
                batch, list, counts + c, ladder, slots, plan.slot_bytes / static_cast<int64_t>(sizeof(T)));
        error = cudaGetLastError();
    }
    return text_of(error);
}

#define SNMF_INSTANTIATE(T)                                                                                       \
    template const char* ridge_solve<T>(const T*, const T*, T*, int32_t*, int64_t, int64_t, int64_t,              \
                                        const Ladder<T>&, int, uintptr_t);                                        \
    template const char* support_solve<T>(const T*, const int64_t*, const int64_t*, const T*, T*, int32_t*,       \
                                          int64_t, int64_t, int64_t, const Ladder<T>&, void*, int, uintptr_t);
SNMF_INSTANTIATE(float)
SNMF_INSTANTIATE(double)

}  // namespace snmf::cuda
