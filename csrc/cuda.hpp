// What the CUDA part of the module offers to the bindings. Errors come back as text; null means success.
#pragma once

#include <cstdint>

namespace snmf::cuda {

// Number of usable devices; any error of the runtime (no driver, an old one) counts as none.
int device_count();

// Largest k that ridge_solve takes on this device for elements of `element_size` bytes.
int64_t ridge_max_k(int device, int element_size);

// Enqueues the solves on `stream` (a cudaStream_t of `device`) without waiting. Arguments as RidgeArgs, on the device.
template <typename T>
const char* ridge_solve(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int64_t k, int64_t m, T ridge,
                        int device, uintptr_t stream);

}  // namespace snmf::cuda
