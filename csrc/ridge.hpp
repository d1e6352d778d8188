// Regularised symmetric positive definite systems (G + ridge I) X = B, each solved by a group of cooperating threads.
//
// Written once: ridge.cu runs it with a warp or a block as the group, tests/csrc/ridge_threads.cpp with host threads
// and a barrier, where ThreadSanitizer can watch it. A Group is made of teams of lanes and offers
//     lane(), lanes()   this thread's place in its team, and the team's size
//     team(), teams()   its team's place in the group, and their number
//     team_sync()       a barrier and memory fence for the team
//     sync()            the same for the whole group
//     take(counter)     the counter's value, which it raises by one, whatever other groups do to it meanwhile
//                       (needed for listing systems only)
#pragma once

#include <cmath>
#include <cstdint>

#include "ladder.hpp"

#if defined(__CUDACC__)
#define SNMF_HOST_DEVICE __host__ __device__
#define SNMF_UNROLL _Pragma("unroll")
#else
#define SNMF_HOST_DEVICE
#define SNMF_UNROLL
#endif

// Tests leave out one barrier at a time, to see that it would be missed.
#if defined(SNMF_TEST_DROP_BARRIER)
#define SNMF_SYNC(number, group) (SNMF_TEST_DROP_BARRIER == (number) ? void() : (group).sync())
#else
#define SNMF_SYNC(number, group) (group).sync()
#endif

namespace snmf {

// Elements of memory that one system with `width` right-hand sides needs.
SNMF_HOST_DEVICE inline int64_t ridge_workspace(int64_t k, int64_t width) {
    return k * (k + 1) / 2 + 3 * k + width * k;
}

// Element (i, j), j <= i, of a packed lower triangle.
SNMF_DEVICE int packed(int i, int j) { return i * (i + 1) / 2 + j; }

// What a group solves: G [k, k], of which the lower triangle is read, and `width` columns of B and X.
template <typename T>
struct DenseSystem {
    const T* G;
    const T* B;
    T* X;
    int k, width;
    int64_t m;  // rows of B and X are so far apart
    SNMF_DEVICE T gram(int i, int j) const { return G[static_cast<int64_t>(i) * k + j]; }
    SNMF_DEVICE T right(int i, int c) const { return B[i * m + c]; }
    SNMF_DEVICE void put(int i, int c, T value) const { X[i * m + c] = value; }
};

// The same for a part of a shared G: those rows and columns that are members.
template <typename T>
struct SupportSystem {
    const T* G;
    int64_t stride;  // rows of G are so far apart
    const int64_t* members;
    const T* B;
    T* X;
    int k;
    static constexpr int width = 1;
    SNMF_DEVICE T gram(int i, int j) const { return G[members[i] * stride + members[j]]; }
    SNMF_DEVICE T right(int i, int) const { return B[i]; }
    SNMF_DEVICE void put(int i, int, T value) const { X[i] = value; }
};

// Where the parts of a workspace lie.
template <typename T>
struct RidgeWorkspace {
    T* L;          // packed lower triangle: L_ip is entry (i, p) of the factor times pivot p
    T* column[2];  // the current column and the next one, side by side in memory
    T* inverse;    // 1 / L_pp
    T* x;          // [width, k]; right-hand side c belongs to team c mod teams
    SNMF_DEVICE RidgeWorkspace(T* start, int k)
        : L(start), column{L + packed(k, 0), L + packed(k, 0) + k}, inverse(column[1] + k), x(inverse + k) {}
};

// Right-looking U D Uᵀ of G + ridge I, whose pivots D are the squares of Cholesky's: without square roots, a column
// is used as it stands, and there is one barrier for each. The right-hand sides ride along, which is the forward
// substitution. Returns 0, or the 1-based pivot that was not positive, the same on all threads.
template <typename T, typename Group, typename System>
SNMF_DEVICE int factorize_group(Group& group, const System& system, T ridge, const RidgeWorkspace<T>& work) {
    const int k = system.k, width = system.width;
    T *L = work.L, *x = work.x, *column = work.column[0], *next = work.column[1];
    for (int i = group.team(); i < k; i += group.teams())
        for (int j = group.lane(); j <= i; j += group.lanes()) {
            const T value = system.gram(i, j) + (i == j ? ridge : T(0));
            L[packed(i, j)] = value;
            if (j == 0) column[i] = value;
        }
    for (int c = group.team(); c < width; c += group.teams())
        for (int i = group.lane(); i < k; i += group.lanes()) x[c * k + i] = system.right(i, c);

    for (int p = 0; p < k; ++p) {
        SNMF_SYNC(1, group);  // column p is there; what was read from the one before may be written over
        const T pivot = column[p];
        if (!(pivot > T(0))) return p + 1;
        const T inverse = T(1) / pivot;
        if (group.team() == 0 && group.lane() == 0) work.inverse[p] = inverse;
        for (int i = p + 1 + group.team(); i < k; i += group.teams()) {
            const T factor = column[i] * inverse;
            for (int j = p + 1 + group.lane(); j <= i; j += group.lanes()) {
                const T value = L[packed(i, j)] - factor * column[j];
                L[packed(i, j)] = value;
                if (j == p + 1) next[i] = value;
            }
        }
        for (int c = group.team(); c < width; c += group.teams()) {
            const T value = x[c * k + p] * inverse;
            for (int i = p + 1 + group.lane(); i < k; i += group.lanes()) x[c * k + i] -= column[i] * value;
        }
        T* const done = column;
        column = next;
        next = done;
    }
    group.sync();
    return 0;
}

// Back substitution; each right-hand side stays within its team.
template <typename T, typename Group, typename System>
SNMF_DEVICE void substitute_group(Group& group, const System& system, const RidgeWorkspace<T>& work) {
    const int k = system.k;
    for (int c = group.team(); c < system.width; c += group.teams()) {
        T* x = work.x + c * k;
        // x_i is to be divided by its pivot only once all that follows it has been subtracted.
        for (int i = k - 1; i >= 0; --i) {
            const T value = x[i] * work.inverse[i];
            for (int j = group.lane(); j < i; j += group.lanes()) x[j] -= work.L[packed(i, j)] * value;
            group.team_sync();
        }
        for (int i = group.lane(); i < k; i += group.lanes()) system.put(i, c, x[i] * work.inverse[i]);
    }
}

// Solves one system with as large a ridge as it takes. Returns -e after e escalations, or the 1-based pivot that was
// not positive at the last try, and then fills X with NaN; the same on all threads.
template <typename T, typename Group, typename System>
SNMF_DEVICE int ridge_solve_group(Group& group, const System& system, const Ladder<T>& ladder, T* workspace) {
    const RidgeWorkspace<T> work(workspace, system.k);
    T ridge = ladder.ridge;
    for (int step = 0;;) {
        const int failed = factorize_group(group, system, ridge, work);
        if (!failed) {
            substitute_group(group, system, work);
            return -step;
        }
        if (step >= ladder.escalations) {
            for (int c = group.team(); c < system.width; c += group.teams())
                for (int i = group.lane(); i < system.k; i += group.lanes()) system.put(i, c, static_cast<T>(NAN));
            return failed;
        }
        T largest = T(0);
        for (int i = 0; i < system.k; ++i) {
            const T entry = system.gram(i, i);
            if (entry > largest) largest = entry;
        }
        ridge = rung(ladder, largest, ++step);
        SNMF_SYNC(2, group);  // all have read the pivot before the system is read anew
    }
}

// Ragged systems by size. Those of up to limit[0] members are solved at once, those of up to limit[c] are listed, for
// groups of another size: neuron by neuron at lists + first[c], counts[c] of them.
constexpr int size_classes = 5;
struct SizeClasses {
    int64_t limit[size_classes];
    int64_t first[size_classes];
};

// Of each of d neurons a system, as SupportArgs; all of it on the device.
template <typename T>
struct SupportBatch {
    const T* G;
    int64_t k;
    const int64_t* offsets;
    const int64_t* members;
    const T* B;
    T* X;
    int32_t* info;

    template <typename Group>
    SNMF_DEVICE void solve(Group& group, int64_t neuron, const Ladder<T>& ladder, T* workspace) const {
        const int64_t start = offsets[neuron];
        const int size = static_cast<int>(offsets[neuron + 1] - start);
        const SupportSystem<T> system{G, k, members + start, B + start, X + start, size};
        const int found = ridge_solve_group(group, system, ladder, workspace);
        if (group.team() == 0 && group.lane() == 0) info[neuron] = found;
    }
};

// Solves the neuron's system if it is a small one, and lists it otherwise.
template <typename T, typename Group>
SNMF_DEVICE void support_solve_or_list(Group& group, const SupportBatch<T>& batch, int64_t neuron,
                                       const SizeClasses& classes, int32_t* counts, int32_t* lists,
                                       const Ladder<T>& ladder, T* workspace) {
    const int64_t size = batch.offsets[neuron + 1] - batch.offsets[neuron];
    if (size <= classes.limit[0]) {
        batch.solve(group, neuron, ladder, workspace);
    } else if (group.team() == 0 && group.lane() == 0) {
        // With places that are known when compiling, the classes stay out of local memory.
        int chosen = 1;
        int64_t first = classes.first[1];
        SNMF_UNROLL
        for (int c = 2; c < size_classes; ++c)
            if (size > classes.limit[c - 1]) chosen = c, first = classes.first[c];
        lists[first + group.take(counts + chosen)] = static_cast<int32_t>(neuron);
    }
}

// Solves what was listed: of `count` systems every `groups`-th, from number `group_index`.
template <typename T, typename Group>
SNMF_DEVICE void support_solve_listed(Group& group, const SupportBatch<T>& batch, const int32_t* list, int32_t count,
                                      int64_t group_index, int64_t groups, const Ladder<T>& ladder, T* workspace) {
    for (int64_t at = group_index; at < count; at += groups) {
        batch.solve(group, list[at], ladder, workspace);
        SNMF_SYNC(3, group);  // the workspace serves the next one
    }
}

}  // namespace snmf
