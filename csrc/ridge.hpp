// One regularised symmetric positive definite system (G + ridge I) X = B, solved by a group of cooperating threads.
//
// Written once: ridge.cu runs it with a warp or a block as the group, tests/csrc/ridge_threads.cpp with host threads
// and a barrier, where ThreadSanitizer can watch it. A Group is made of teams of lanes and offers
//     lane(), lanes()   this thread's place in its team, and the team's size
//     team(), teams()   its team's place in the group, and their number
//     team_sync()       a barrier and memory fence for the team
//     sync()            the same for the whole group
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SNMF_DEVICE __device__ __forceinline__
#else
#define SNMF_DEVICE inline
#endif

namespace snmf {

// Elements of fast memory that one system with `width` right-hand sides needs.
#if defined(__CUDACC__)
__host__ __device__
#endif
inline int64_t ridge_workspace(int64_t k, int64_t width) {
    return k * (k + 1) / 2 + 2 * k + width * k;
}

// Element (i, j), j <= i, of a packed lower triangle.
SNMF_DEVICE int packed(int i, int j) { return i * (i + 1) / 2 + j; }

// Solves for `width` right-hand sides. G and B point at this system and at its first right-hand side; rows of
// B and X are `m` apart. Returns 0, or the 1-based pivot that was not positive, and then fills X with NaN;
// the same on all threads.
template <typename T, typename Group>
SNMF_DEVICE int ridge_solve_group(Group& group, const T* G, const T* B, T* X, int k, int64_t m, int width, T ridge,
                                  T* workspace) {
    T* L = workspace;                    // packed lower triangle
    T* column = L + k * (k + 1) / 2;     // the current column of the factor
    T* inverse = column + k;             // 1 / L_pp
    T* x = inverse + k;                  // [width, k]; right-hand side c belongs to team c mod teams

    for (int i = group.team(); i < k; i += group.teams())
        for (int j = group.lane(); j <= i; j += group.lanes())
            L[packed(i, j)] = G[static_cast<int64_t>(i) * k + j] + (i == j ? ridge : T(0));
    for (int c = group.team(); c < width; c += group.teams())
        for (int i = group.lane(); i < k; i += group.lanes()) x[c * k + i] = B[i * m + c];

    // Right-looking Cholesky; the right-hand sides ride along, which is the forward substitution.
    for (int p = 0; p < k; ++p) {
        group.sync();
        const T pivot = L[packed(p, p)];
        if (!(pivot > T(0))) {
            for (int c = group.team(); c < width; c += group.teams())
                for (int i = group.lane(); i < k; i += group.lanes()) X[i * m + c] = static_cast<T>(NAN);
            return p + 1;
        }
        const T scale = T(1) / std::sqrt(pivot);
        const int rank = group.team() * group.lanes() + group.lane(), size = group.teams() * group.lanes();
        if (rank == 0) inverse[p] = scale;
        for (int i = p + 1 + rank; i < k; i += size) {
            const T value = L[packed(i, p)] * scale;
            column[i] = value;
            L[packed(i, p)] = value;
        }
        for (int c = group.team() + group.teams() * group.lane(); c < width; c += group.teams() * group.lanes())
            x[c * k + p] *= scale;
#if !defined(SNMF_TEST_DROP_BARRIER)  // a test removes it to see that it would be missed
        group.sync();
#endif
        for (int i = p + 1 + group.team(); i < k; i += group.teams()) {
            const T factor = column[i];
            for (int j = p + 1 + group.lane(); j <= i; j += group.lanes()) L[packed(i, j)] -= factor * column[j];
        }
        for (int c = group.team(); c < width; c += group.teams()) {
            const T value = x[c * k + p];
            for (int i = p + 1 + group.lane(); i < k; i += group.lanes()) x[c * k + i] -= column[i] * value;
        }
    }
    group.sync();

    // Back substitution; each right-hand side stays within its team.
    for (int c = group.team(); c < width; c += group.teams()) {
        T* xc = x + c * k;
        for (int i = k - 1; i >= 0; --i) {
            const T value = xc[i] * inverse[i];
            group.team_sync();  // all lanes have read x_i before one replaces it
            if (group.lane() == 0) xc[i] = value;
            for (int j = group.lane(); j < i; j += group.lanes()) xc[j] -= L[packed(i, j)] * value;
            group.team_sync();
        }
    }
    for (int c = group.team(); c < width; c += group.teams())
        for (int i = group.lane(); i < k; i += group.lanes()) X[i * m + c] = x[c * k + i];
    return 0;
}

}  // namespace snmf
