// What a launch of support_solve reckons with, from what the host knows: the sizes of the systems are the device's
// secret, but none is larger than k, and together they have so many members.
#pragma once

#include <cstdint>

#include "ridge.hpp"

namespace snmf {

constexpr int max_threads = 512, slot_threads = 1024;  // of a block with the factor in shared or in global memory
constexpr int64_t max_warp_k = 32;
constexpr int64_t max_packed_k = 46000;  // k (k + 1) fits 31 bits
// Slots of systems beyond shared memory: so many bytes together, which second-level caches hold, but one at least.
constexpr int64_t slot_budget = 32 << 20;
constexpr int64_t slot_alignment = 256;
constexpr int64_t reserved_shared = 1024;  // that the system takes of each block

struct DeviceLimits {
    int64_t processors;
    int64_t shared_per_block, shared_per_processor;  // bytes
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Bytes of a workspace for one right-hand side.
inline int64_t workspace_bytes(int64_t k, int64_t element_size) { return ridge_workspace(k, 1) * element_size; }

// Largest system that fits the shared memory of one block.
inline int64_t largest_in_shared(const DeviceLimits& limits, int64_t element_size) {
    int64_t k = 0;
    while (workspace_bytes(k + 1, element_size) <= limits.shared_per_block) ++k;
    return k;
}

inline int threads_for(int64_t k) { return k <= 64 ? 128 : k <= 128 ? 256 : max_threads; }

struct SupportPlan {
    SizeClasses classes;           // the last one is beyond shared memory
    int64_t blocks[size_classes];  // as many as are resident, or as there may be systems; 0 for a class that is empty
    int64_t slot_bytes;
    int64_t lists_at, slots_at, bytes;  // of device memory; the counts of the lists lie at its beginning

    SupportPlan(int64_t k, int64_t d, int64_t members, const DeviceLimits& limits, int64_t element_size) {
        const int64_t largest = largest_in_shared(limits, element_size);
        const int64_t sizes[size_classes] = {max_warp_k, 64, 128, largest, k};
        slot_bytes = aligned(workspace_bytes(k, element_size));
        int64_t listed = 0;
        for (int c = 0; c < size_classes; ++c) {
            const bool in_shared = c + 1 < size_classes;
            classes.limit[c] = least(least(sizes[c], k), in_shared ? largest : k);
            classes.first[c] = listed;
            blocks[c] = 0;
            if (c == 0 || classes.limit[c] == classes.limit[c - 1]) continue;
            // Each system of this class has more members than the class before allows.
            const int64_t most = least(d, members / (classes.limit[c - 1] + 1));
            listed += most;
            const int64_t block_bytes = workspace_bytes(classes.limit[c], element_size) + reserved_shared;
            const int64_t resident = in_shared ? limits.processors * (limits.shared_per_processor / block_bytes)
                                               : least(limits.processors, slot_budget / slot_bytes);
            blocks[c] = least(most, resident > 1 ? resident : 1);
        }
        lists_at = aligned(size_classes * static_cast<int64_t>(sizeof(int32_t)));
        slots_at = lists_at + aligned(listed * static_cast<int64_t>(sizeof(int32_t)));
        bytes = slots_at + blocks[size_classes - 1] * slot_bytes;
    }

  private:
    static int64_t aligned(int64_t size) { return (size + slot_alignment - 1) / slot_alignment * slot_alignment; }
};

}  // namespace snmf
