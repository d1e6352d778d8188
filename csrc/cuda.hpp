// What the CUDA part of the module offers to the bindings. Errors come back as text; null means success.
#pragma once

#include <cstdint>

#include "ladder.hpp"

namespace snmf::cuda {

// Number of usable devices; any error of the runtime (no driver, an old one) counts as none.
int device_count();

// Largest k that ridge_solve takes on this device for elements of `element_size` bytes.
int64_t ridge_max_k(int device, int element_size);

// Enqueues the solves on `stream` (a cudaStream_t of `device`) without waiting. Arguments as RidgeArgs, on the device.
template <typename T>
const char* ridge_solve(const T* G, const T* B, T* X, int32_t* info, int64_t batch, int64_t k, int64_t m,
                        const Ladder<T>& ladder, int device, uintptr_t stream);

// Bytes of device memory that support_solve needs for d neurons with `members` features between them.
int64_t support_workspace(int64_t k, int64_t d, int64_t members, int device, int element_size);

// The same for ragged systems; arguments as SupportArgs, `member_count` of members, B and X each. The workspace is of
// the size above, aligned to 256 bytes, and must stay until the stream has come this far.
template <typename T>
const char* support_solve(const T* G, const int64_t* offsets, const int64_t* members, const T* B, T* X, int32_t* info,
                          int64_t k, int64_t d, int64_t member_count, const Ladder<T>& ladder, void* workspace,
                          int device, uintptr_t stream);

}  // namespace snmf::cuda
