// The ridges that a regularised solve tries in turn. Included by the CPU kernels and by the CUDA code.
#pragma once

#if defined(__CUDACC__)
#define SNMF_DEVICE __device__ __forceinline__
#else
#define SNMF_DEVICE inline
#endif

namespace snmf {

template <typename T>
struct Ladder {
    T ridge;          // added to the diagonal at first
    int escalations;  // so often at most a larger one is tried where that leaves no Cholesky factor
    T floor;          // the first larger one is at least this share of the largest diagonal entry
};

// The ridge after `step` escalations for a system with this largest diagonal entry (0 if none is positive):
// ridge, max(10 ridge, floor * largest), and tenfold from there.
// Static, so that each instruction level of the CPU kernels has one of its own.
template <typename T>
SNMF_DEVICE static T rung(const Ladder<T>& ladder, T largest, int step) {
    if (step == 0) return ladder.ridge;
    const T epsilon = static_cast<T>(sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
    const T smallest = static_cast<T>(sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022);
    T value = (ladder.floor > epsilon ? ladder.floor : epsilon) * largest;
    if (!(value > smallest)) value = smallest;  // a system of zeros has a solution then
    if (T(10) * ladder.ridge > value) value = T(10) * ladder.ridge;
    T power = T(1);  // exact, while there are enough bits
    for (int i = 1; i < step; ++i) power *= T(10);
    return value * power;
}

}  // namespace snmf
