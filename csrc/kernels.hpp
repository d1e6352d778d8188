// The CPU kernels as plain functions, one table per instruction level.
//
// Notation (README, "Notation"): A [d, n] activations, Z [d, k] features with `count` kept entries per
// column, Y [k, n] coefficients, G/B/X the batched systems. Strides are in elements.
// Every function returns 0; or 1 if scratch memory could not be allocated, or 2 if it was told to stop. Its output is
// undefined then.
#pragma once

#include <cstdint>

#include "ladder.hpp"

namespace snmf {

// What a kernel asks now and then, on the thread that called it: non-zero means that it shall stop. `done` is about the
// share of the work that is done. Without a function it never asks.
struct Interrupt {
    int (*poll)(void* context, double done) = nullptr;
    void* context = nullptr;
};

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

template <typename T>
struct CoefficientArgs {
    const T* Y;      // [k, n], row stride ldy
    int64_t ldy;
    const T* ZtA;    // [k, n], row stride ldp
    int64_t ldp;
    const T* ZtZ;    // [k, k], contiguous
    T* out;          // [k, n], row stride ldo; may be Y itself
    int64_t ldo;
    int64_t k, n;
    T eps;           // multiplicative update only
    int sweeps;
    int threads;
    Interrupt interrupt = {};
};

template <typename T>
struct SelectArgs {
    const T* Z;      // element (row, column) at Z[row * row_stride + column * column_stride]
    int64_t row_stride, column_stride;
    int64_t d, k, count;
    int64_t* indices;  // [k, count], ascending in each row
    T* values;         // [k, count]
    int threads;
    Interrupt interrupt = {};
};

template <typename T>
struct SparseProductArgs {
    const void* A;   // element type a_type, (neuron, token) at [neuron * row_stride + token * column_stride]
    DType a_type;
    int64_t row_stride, column_stride;
    int64_t d, n;
    const int64_t* indices;  // [k, count]
    const T* values;         // [k, count]
    int64_t k, count;
    T* out;          // [k, n], contiguous
    int threads;
    Interrupt interrupt = {};
    const int64_t* starts = nullptr;  // [k + 1] or null, see PassArgs
};

// What a pass adds up over the tokens.
enum Sum : int {
    sum_dot = 0,        // weighted <ZtA - shift, Y>
    sum_violation = 1,  // squared distance from the optimality conditions, if measure
    sum_norm = 2,       // ‖Y‖²
    sum_residual = 3,   // weighted ‖A − ZY‖², if residual_values
    sum_data = 4,       // weighted ‖A‖², if residual_values
    sum_sweeps = 5,     // the most sweeps that a tile took
    sum_count = 6
};

template <typename T>
struct PassArgs {
    const void* A;   // as in SparseProductArgs
    DType a_type;
    int64_t row_stride, column_stride;
    int64_t d, n;
    const int64_t* indices;  // [k, count]
    const T* values;         // [k, count]
    int64_t k, count;
    const T* ZtZ;    // [k, k], contiguous
    const T* Y;      // [k, n], row stride ldy
    int64_t ldy;
    T* out;          // [k, n], row stride ldo; may be Y itself
    int64_t ldo;
    // Each of these may be null.
    const T* row_scale;      // [k], multiplies the rows of Y before the first sweep
    const T* shift;          // [k], subtracted from the rows of ZtA
    const T* token_weights;  // [n], weights of the tokens in AYt and sums[0]
    T* AYt;                  // [k, count]: A Yᵀ of the new Y at the kept entries
    const T* feature_norms;  // [k], read if max_active > 0: contribution of a feature to a token is norm * y
    int64_t max_active;      // at most so many features to a token, then sweeps over those alone; 0: any number
    const T* residual_values;  // [k, count], Z in the units of A, to measure the residual with
    double* sums;    // [6], see Sum
    T eps;           // multiplicative update only
    T tol;           // coordinate descent: a tile is done when a sweep changes it by less than tol ‖y‖
    int sweeps;
    int multiplicative;
    int measure;
    int threads;
    Interrupt interrupt = {};
    // Column i keeps its first starts[i + 1] - starts[i] entries only, the others are zeros; null: count, all.
    const int64_t* starts = nullptr;
};

template <typename T>
struct ColumnArgs {
    const T* YYt;    // [k, k], contiguous
    const T* AYt;    // [k, d], contiguous
    int64_t* indices;  // [k, count], ascending in each row; replaced
    T* values;         // [k, count]; replaced
    int64_t d, k, count;
    int sweeps;
    Interrupt interrupt = {};
};

template <typename T>
struct SupportArgs {
    const T* G;              // [k, k], symmetric, contiguous
    const int64_t* offsets;  // [d + 1]: the support of neuron r is members[offsets[r] : offsets[r + 1]]
    const int64_t* members;  // features, each at most once to a neuron
    const T* B;              // right-hand sides, as members
    T* X;                    // solutions, as members
    int32_t* info;           // [d], as in RidgeArgs
    int64_t k, d;
    Ladder<T> ladder;
    int threads;
    Interrupt interrupt = {};
};

template <typename T>
struct RidgeArgs {
    const T* G;      // [batch, k, k], symmetric; the lower triangle is read
    const T* B;      // [batch, k, m]
    T* X;            // [batch, k, m]
    int32_t* info;   // [batch]; 0, or -e after e escalations, or the 1-based pivot that was not positive at the last
                     // try (X is then NaN)
    int64_t batch, k, m;
    Ladder<T> ladder;
    int threads;
    Interrupt interrupt = {};
};

template <typename T>
struct KernelSet {
    int (*multiplicative_update)(const CoefficientArgs<T>&);
    int (*coordinate_descent)(const CoefficientArgs<T>&);
    int (*winner_take_all)(const SelectArgs<T>&);
    int (*sparse_product)(const SparseProductArgs<T>&);
    int (*coefficient_pass)(const PassArgs<T>&);
    int (*column_descent)(const ColumnArgs<T>&);
    int (*ridge_solve)(const RidgeArgs<T>&);
    int (*support_solve)(const SupportArgs<T>&);
};

struct KernelTable {
    const char* name;
    KernelSet<float> f32;
    KernelSet<double> f64;
    template <typename T> const KernelSet<T>& of() const;
};
template <> inline const KernelSet<float>& KernelTable::of<float>() const { return f32; }
template <> inline const KernelSet<double>& KernelTable::of<double>() const { return f64; }

#if defined(__x86_64__)
extern const KernelTable table_v2, table_v3, table_v4;
#else
extern const KernelTable table_baseline;
#endif

// The table in use: the best level that this processor has, capped by SNMF_CPU_ISA or set_level.
const KernelTable& kernels();
// Chooses a level by name; returns false if the processor (or this build) does not have it.
bool set_level(const char* name);
// Names of all levels that this processor can run, comma-separated, lowest first.
const char* supported_levels();

}  // namespace snmf
