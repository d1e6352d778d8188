// Runs every CPU kernel of one instruction level, to be built with AddressSanitizer and UndefinedBehaviorSanitizer by
// tests/test_sanitizers.py. Each argument lies in memory of its own, of exactly the size that kernels.hpp asks for;
// shapes, strides and values are awkward. Where the values are benign, results are compared with plain loops in double.
//
// kernels_sanitized                 prints the levels of this processor
// kernels_sanitized LEVEL           prints calls, worst error and arguments of each kernel; or says what is wrong and
//                                   exits 1
// kernels_sanitized LEVEL FAULT     goes wrong on purpose, to prove that it would be noticed:
//     short:KERNEL.ARGUMENT         that argument is an element too short
//     misaligned:KERNEL.ARGUMENT    that argument starts a byte off its type's alignment
//     idle:KERNEL                   the kernel does nothing
//     smear:KERNEL                  the kernel writes between the rows of its output
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace {

char current_case[400] = "nothing";

}  // namespace

// Fresh memory holds NaN, so that results show where scratch memory is read before it is written. Scratch memory that
// cannot be had must lead to an error status, not to an abort.
extern "C" const char* __asan_default_options() {
    return "allocator_may_return_null=1:max_malloc_fill_size=1000000000:malloc_fill_byte=255";
}
extern "C" void __asan_on_error() { std::fprintf(stderr, "while running %s\n", current_case); }
extern "C" void __ubsan_on_report() { std::fprintf(stderr, "while running %s\n", current_case); }

namespace {

using snmf::DType;

struct {
    std::string kind, kernel, argument;
} fault;
std::string current_kernel;
std::vector<std::string> arguments_met;

bool faulty(const char* kind, const char* argument) {
    return fault.kind == kind && fault.kernel == current_kernel && fault.argument == argument;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    std::printf("wrong: %s: ", current_case);
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
    std::exit(1);
}

// Memory for exactly `elements`: an access past either end is an AddressSanitizer error. What comes before the first is
// poisoned, and puts it off the alignment of every vector. Of no elements the address is null, as torch has it.
class Memory {
  public:
    Memory(const char* argument, int64_t elements, size_t element_size)
        : allocated_(std::max<int64_t>(0, elements - faulty("short", argument))) {
        if (elements == 0) return;
        if (std::find(arguments_met.begin(), arguments_met.end(), argument) == arguments_met.end())
            arguments_met.push_back(argument);
        const size_t lead = 8, bytes = static_cast<size_t>(allocated_) * element_size;
        const size_t off = faulty("misaligned", argument) ? 1 : 0;
        base_ = static_cast<char*>(std::malloc(lead + off + bytes));
        if (!base_) fail("no memory");
        ASAN_POISON_MEMORY_REGION(base_, lead);
        first_ = base_ + lead + off;
        std::memset(first_, 0xff, bytes);
    }
    ~Memory() { std::free(base_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

  protected:
    char* first_ = nullptr;
    int64_t allocated_;  // less than asked for if that is the fault

  private:
    char* base_ = nullptr;
};

int64_t span(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    return rows && columns ? (rows - 1) * row_stride + (columns - 1) * column_stride + 1 : 0;
}

// A matrix argument; all bits are set where nothing was put, which is NaN or -1.
template <typename T>
class Buffer : Memory {
  public:
    Buffer(const char* argument, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride = 1)
        : Memory(argument, span(rows, columns, row_stride, column_stride), sizeof(T)),
          rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride) {}
    Buffer(const char* argument, int64_t count) : Buffer(argument, count ? 1 : 0, count, count) {}
    Buffer(const char* argument, const std::vector<T>& values) : Buffer(argument, static_cast<int64_t>(values.size())) {
        for (int64_t i = 0; i < columns; ++i) put(0, i, values[i]);
    }
    Buffer(const char* argument, const std::vector<T>& values, int64_t rows, int64_t columns, int64_t row_stride)
        : Buffer(argument, rows, columns, row_stride) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) put(i, j, values[i * columns + j]);
    }
    T* get() { return reinterpret_cast<T*>(first_); }
    // Copied bytewise, for the memory may be misaligned.
    void put(int64_t i, int64_t j, T value) {
        const int64_t place = i * row_stride + j * column_stride;
        if (place < allocated_) std::memcpy(first_ + place * sizeof(T), &value, sizeof(T));
    }
    T at(int64_t i, int64_t j) const {
        const int64_t place = i * row_stride + j * column_stride;
        T value = T();
        if (place < allocated_) std::memcpy(&value, first_ + place * sizeof(T), sizeof(T));
        return value;
    }
    // Whether nothing was written between the rows.
    void check_padding(const char* name) const {
        for (int64_t i = 0; i + 1 < rows && columns; ++i)
            for (int64_t j = columns; j < row_stride; ++j)
                for (size_t byte = 0; byte < sizeof(T); ++byte)
                    if (first_[(i * row_stride + j) * sizeof(T) + byte] != static_cast<char>(0xff))
                        fail("%s: written behind the end of row %lld", name, static_cast<long long>(i));
    }
    const int64_t rows, columns, row_stride, column_stride;
};

// How a matrix may lie in memory.
struct Strides {
    int64_t row, column;
};
constexpr int layouts = 8;
Strides strides_of(int layout, int64_t rows, int64_t columns) {
    switch (layout) {
        case 0: return {columns, 1};            // neuron-major
        case 1: return {columns + 3, 1};        // a slice of that
        case 2: return {1, rows};               // token-major
        case 3: return {1, rows + 5};           // a slice of that
        case 4: return {2, 2 * rows + 3};       // neither is one
        case 5: return {3 * columns + 1, 3};
        case 6: return {1, 0};                  // one token, expanded
        default: return {0, 1};                 // one neuron, expanded
    }
}

// Halves by their definition, for not every compiler has a type for them.
double value_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double infinite = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    const double value = exponent == 31 ? infinite
                         : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                        : std::ldexp(fraction, -24);
    return bits >> 15 ? -value : value;
}
// The nearest one towards zero.
uint16_t half_of_value(double value) {
    if (std::isnan(value)) return 0x7e00;
    int bits = 0;
    for (int bit = 1 << 14; bit; bit >>= 1)
        if (value_of_half(static_cast<uint16_t>(bits | bit)) <= std::fabs(value)) bits |= bit;
    return static_cast<uint16_t>(bits | (std::signbit(value) ? 1 << 15 : 0));
}

// Activations A [d, n] of any element type.
class Activations : Memory {
  public:
    Activations(DType type, int layout, int64_t d, int64_t n)
        : Activations(type, strides_of(layout, d, n), d, n) {}
    const void* get() const { return first_; }
    void put(int64_t row, int64_t token, double value) {
        const int64_t place = row * strides.row + token * strides.column;
        if (place >= allocated_) return;
        char* target = first_ + place * size_of(type);
        const float single = static_cast<float>(value);
        switch (type) {
            case DType::f32: std::memcpy(target, &single, 4); break;
            case DType::f64: std::memcpy(target, &value, 8); break;
            case DType::f16: put_half(row, token, half_of_value(value)); break;
            default: {
                uint32_t bits;
                std::memcpy(&bits, &single, 4);
                const uint16_t upper = static_cast<uint16_t>(bits >> 16);
                std::memcpy(target, &upper, 2);
            }
        }
    }
    void put_half(int64_t row, int64_t token, uint16_t bits) {
        const int64_t place = row * strides.row + token * strides.column;
        if (place < allocated_) std::memcpy(first_ + place * 2, &bits, 2);
    }
    double at(int64_t row, int64_t token) const {
        const int64_t place = row * strides.row + token * strides.column;
        if (place >= allocated_) return 0;
        const char* source = first_ + place * size_of(type);
        float single;
        double value;
        uint16_t half;
        switch (type) {
            case DType::f32: std::memcpy(&single, source, 4); return static_cast<double>(single);
            case DType::f64: std::memcpy(&value, source, 8); return value;
            case DType::f16: std::memcpy(&half, source, 2); return value_of_half(half);
            default: {
                uint16_t upper;
                std::memcpy(&upper, source, 2);
                const uint32_t bits = static_cast<uint32_t>(upper) << 16;
                std::memcpy(&single, &bits, 4);
                return static_cast<double>(single);
            }
        }
    }
    const DType type;
    const Strides strides;
    const int64_t d, n;

  private:
    Activations(DType type, Strides strides, int64_t d, int64_t n)
        : Memory("A", span(d, n, strides.row, strides.column), size_of(type)),
          type(type), strides(strides), d(d), n(n) {}
    static size_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
};

struct Random {
    std::mt19937 bits;
    explicit Random(uint32_t seed) : bits(seed) {}
    // Not the standard library's distributions: the same numbers everywhere.
    double uniform(double low, double high) { return low + (high - low) * (bits() >> 8) / double(1 << 24); }
    int64_t below(int64_t end) { return static_cast<int64_t>(bits() % static_cast<uint32_t>(end)); }
    bool chance(double p) { return uniform(0, 1) < p; }
    // Few bits, so that every element type holds it exactly.
    double sixteenths() { return static_cast<double>(below(65) - 32) / 16; }
};

// What may come out of broken data.
template <typename T>
T wild(Random& random) {
    using Limits = std::numeric_limits<T>;
    const T values[] = {T(0), -T(0), Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::max(),
                        Limits::lowest(), Limits::denorm_min(), -Limits::denorm_min(), Limits::min() / 2, T(1), T(-1)};
    return values[random.below(12)];
}

enum Values {
    benign,    // compared
    zeros,     // among benign values; dead features; compared
    poisoned,  // NaN and infinities in one token: the others are compared
    tiny,      // denormal numbers; not compared
    huge,      // sums overflow; not compared
    not_a_number,
    anything,
    values_end
};
const char* const value_names[] = {"benign", "zeros", "poisoned", "tiny", "huge", "NaN", "anything"};

// One value of an array that is filled with `values`; `usual` is what it would be if benign.
template <typename T>
T draw(Values values, Random& random, double usual) {
    using Limits = std::numeric_limits<T>;
    switch (values) {
        case zeros: return random.chance(0.4) ? T(0) : static_cast<T>(usual);
        case tiny: return static_cast<T>(usual) * Limits::min();
        case huge: return static_cast<T>(usual) * (Limits::max() / 4);
        case not_a_number: return Limits::quiet_NaN();
        case anything: return wild<T>(random);
        default: return static_cast<T>(usual);
    }
}

// Data are drawn anew, so often at most, if rounding may turn a choice of the largest.
constexpr int most_attempts = 100;

constexpr int thread_counts[] = {1, 2, 5};

// Errors relative to the size of what was added up. The worst that were measured, over all levels: float 7e-6 (where
// descent stops in time; elsewhere 2e-6), double 3e-15.
template <typename T>
constexpr double tolerance = sizeof(T) == 4 ? 2e-5 : 2e-14;

// Plain definitions in double; matrices are rows one after another.
using Doubles = std::vector<double>;

template <typename T>
Doubles widened(const std::vector<T>& values) {
    return Doubles(values.begin(), values.end());
}

void update_token(bool multiplicative, double* y, const double* p, const Doubles& q, int64_t k, double eps) {
    Doubles old(y, y + k);
    for (int64_t i = 0; i < k; ++i) {
        if (multiplicative) {
            double above = std::max(p[i], 0.0), below = std::max(-p[i], 0.0) + eps;
            for (int64_t j = 0; j < k; ++j) (q[i * k + j] > 0 ? below : above) += std::fabs(q[i * k + j]) * old[j];
            y[i] = old[i] * std::sqrt(above / below);
        } else {
            double rest = p[i];
            for (int64_t j = 0; j < k; ++j)
                if (j != i) rest -= q[i * k + j] * y[j];
            y[i] = q[i * k + i] > 0 ? std::max(rest / q[i * k + i], 0.0) : 0.0;
        }
    }
}

// The places of the `count` largest magnitudes, ascending; of equal ones the first. NaN is larger than everything. If
// the last one taken and the first one left differ by less than `band` of the largest, rounding may turn the choice:
// *close is set then.
std::vector<int64_t> largest(const Doubles& values, int64_t count, double band, bool* close) {
    const auto magnitude = [&](int64_t i) { return std::fabs(values[i]); };
    const auto above = [&](int64_t a, int64_t b) {
        if (std::isnan(values[a]) != std::isnan(values[b])) return std::isnan(values[a]);
        return magnitude(a) > magnitude(b);
    };
    std::vector<int64_t> order(values.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::stable_sort(order.begin(), order.end(), above);
    if (band > 0 && count > 0 && count < static_cast<int64_t>(order.size())) {
        const double taken = magnitude(order[count - 1]), left = magnitude(order[count]);
        if (taken > 0 && taken - left <= band * magnitude(order[0])) *close = true;
    }
    order.resize(count);
    std::sort(order.begin(), order.end());
    return order;
}

// Solves (G + ridge I) x = b for all columns of b [k, m]; returns 0 or the pivot that is not positive. Reads the lower
// triangle of G.
int32_t solve_plainly(const Doubles& G, int64_t k, double ridge, Doubles& b, int64_t m) {
    Doubles L(G.size());
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            double sum = G[i * k + j] + (i == j ? ridge : 0);
            for (int64_t p = 0; p < j; ++p) sum -= L[i * k + p] * L[j * k + p];
            L[i * k + j] = i == j ? std::sqrt(sum) : sum / L[j * k + j];
            // The factor goes row by row, the kernels' column by column: they meet the same pivots in the same order.
            if (i == j && !(sum > 0)) return static_cast<int32_t>(i + 1);
        }
    for (int64_t c = 0; c < m; ++c) {
        for (int64_t i = 0; i < k; ++i) {
            for (int64_t p = 0; p < i; ++p) b[i * m + c] -= L[i * k + p] * b[p * m + c];
            b[i * m + c] /= L[i * k + i];
        }
        for (int64_t i = k; i-- > 0;) {
            for (int64_t p = i + 1; p < k; ++p) b[i * m + c] -= L[p * k + i] * b[p * m + c];
            b[i * m + c] /= L[i * k + i];
        }
    }
    return 0;
}

// The same with as large a ridge as it takes; returns -e after e escalations.
template <typename T>
int32_t climb(const Doubles& G, int64_t k, const snmf::Ladder<T>& ladder, Doubles& b, int64_t m) {
    double largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, G[i * k + i]);
    double ridge = static_cast<double>(ladder.ridge);
    for (int step = 0;; ++step) {
        const int32_t failed = solve_plainly(G, k, ridge, b, m);
        if (!failed) return -step;
        if (step == ladder.escalations) return failed;
        const double smallest = static_cast<double>(std::numeric_limits<T>::min());
        const double floor = std::max(static_cast<double>(ladder.floor) * largest, smallest);
        ridge = std::max(10 * ridge, step ? 0 : floor);
    }
}

double largest_of(const Doubles& values) {
    double most = 0;
    for (double value : values) most = std::max(most, std::fabs(value));
    return most;
}

// Features with `count` kept neurons each, ascending. Some keep fewer, and are filled up with zeros at the last one's
// row, as SparseColumns.joined does it.
template <typename T>
struct Features {
    int64_t d, k, count;
    std::vector<int64_t> indices;
    std::vector<T> values;

    Features(int64_t d, int64_t k, int64_t count, Random& random)
        : d(d), k(k), count(count), indices(k * count), values(k * count) {
        for (int64_t i = 0; i < k && count; ++i) {
            std::vector<int64_t> rows(d);
            for (int64_t row = 0; row < d; ++row) rows[row] = row;
            for (int64_t row = 0; row < d; ++row) std::swap(rows[row], rows[row + random.below(d - row)]);
            const int64_t kept = random.chance(0.3) ? 1 + random.below(count) : count;
            std::sort(rows.begin(), rows.begin() + kept);
            for (int64_t s = 0; s < count; ++s) {
                indices[i * count + s] = rows[std::min(s, kept - 1)];
                values[i * count + s] = s < kept ? static_cast<T>(random.uniform(-1, 1)) : T(0);
            }
        }
    }
    int64_t at(int64_t i, int64_t s) const { return indices[i * count + s]; }
};

// A well-conditioned Gram matrix with exact zeros; with `values`, one that is not.
template <typename T>
std::vector<T> gram(int64_t k, Values values, Random& random) {
    std::vector<T> q(k * k);
    const double density = k > 40 ? 20.0 / k : 0.6, scale = 0.8 / std::max(1.0, k * density);
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < i; ++j)
            q[i * k + j] = q[j * k + i] = draw<T>(values == zeros ? benign : values, random,
                                                  random.chance(density) ? random.uniform(-scale, scale) : 0);
        q[i * k + i] = draw<T>(values, random, random.uniform(0.7, 1.5));
    }
    return q;
}

template <typename T>
snmf::KernelSet<T> real_kernels;

template <typename Args>
int idle(const Args&) {
    return 0;
}

template <typename T, typename Args, int (*snmf::KernelSet<T>::*kernel)(const Args&)>
int smear(const Args& args) {
    const int status = (real_kernels<T>.*kernel)(args);
    if (args.k > 1 && args.ldo > args.n) args.out[args.n] = T(0);
    return status;
}

template <typename T>
snmf::KernelSet<T> kernels_to_test() {
    using Set = snmf::KernelSet<T>;
    Set set = real_kernels<T> = snmf::kernels().of<T>();
    if (fault.kind == "idle") {
        if (fault.kernel == "multiplicative_update") set.multiplicative_update = idle;
        if (fault.kernel == "coordinate_descent") set.coordinate_descent = idle;
        if (fault.kernel == "winner_take_all") set.winner_take_all = idle;
        if (fault.kernel == "sparse_product") set.sparse_product = idle;
        if (fault.kernel == "coefficient_pass") set.coefficient_pass = idle;
        if (fault.kernel == "column_descent") set.column_descent = idle;
        if (fault.kernel == "ridge_solve") set.ridge_solve = idle;
        if (fault.kernel == "support_solve") set.support_solve = idle;
    }
    if (fault.kind == "smear") {
        using Sweep = snmf::CoefficientArgs<T>;
        if (fault.kernel == "multiplicative_update")
            set.multiplicative_update = smear<T, Sweep, &Set::multiplicative_update>;
        if (fault.kernel == "coordinate_descent") set.coordinate_descent = smear<T, Sweep, &Set::coordinate_descent>;
        if (fault.kernel == "coefficient_pass")
            set.coefficient_pass = smear<T, snmf::PassArgs<T>, &Set::coefficient_pass>;
    }
    return set;
}

// The tests of one level in one type.
template <typename T>
class Suite {
  public:
    Suite(const char* level, int64_t vector_bytes)
        : level_(level), lanes_(vector_bytes / static_cast<int64_t>(sizeof(T))),
          widest_(32 * 1024 / (4 * vector_bytes)), vector_bytes_(vector_bytes), kernels_(kernels_to_test<T>()) {}

    void run() {
        kernel("multiplicative_update", [&] { sweeps(true); });
        kernel("coordinate_descent", [&] { sweeps(false); });
        kernel("winner_take_all", [&] { selections(); });
        kernel("sparse_product", [&] { products(); });
        kernel("coefficient_pass", [&] { passes(); });
        kernel("column_descent", [&] { column_descents(); });
        kernel("ridge_solve", [&] { ridge_solves(); });
        kernel("support_solve", [&] { support_solves(); });
    }

  private:
    const char* level_;
    const int64_t lanes_, widest_;  // widest_: the most features that tiles of four vectors are used for
    const int64_t vector_bytes_;
    const snmf::KernelSet<T> kernels_;
    int64_t calls_ = 0;
    double worst_ = 0;
    uint32_t seed_ = 0;

    template <typename Run>
    void kernel(const char* name, Run run) {
        if (!fault.kernel.empty() && fault.kernel != name) return;
        current_kernel = name;
        calls_ = 0;
        worst_ = 0;
        arguments_met.clear();
        run();
        std::printf("%s %s %s: %lld calls, worst error %.1e, arguments", level_, sizeof(T) == 4 ? "f32" : "f64", name,
                    static_cast<long long>(calls_), worst_);
        for (const std::string& argument : arguments_met) std::printf(" %s", argument.c_str());
        std::printf("\n");
    }

    // Names the case that runs next, for messages, and gives it random numbers and threads of its own.
    __attribute__((format(printf, 2, 3))) Random begin(const char* format, ...) {
        ++seed_;
        const int used = std::snprintf(current_case, sizeof current_case, "%s %s %s, %d threads, ", level_,
                                       sizeof(T) == 4 ? "f32" : "f64", current_kernel.c_str(), threads());
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(current_case + used, sizeof current_case - used, format, arguments);
        va_end(arguments);
        ++calls_;
        return Random(seed_);
    }
    int threads() const { return thread_counts[Random(seed_).below(3)]; }

    void expect_status(int got, int wanted = 0) const {
        if (got != wanted) fail("returned %d, wanted %d", got, wanted);
    }

    // `size`: that of the terms which were added up, so that cancellation is no error.
    void expect_close(const char* name, int64_t i, int64_t j, double got, double wanted, double size) {
        const double error = size > 0 ? std::fabs(got - wanted) / size : got == wanted ? 0.0 : NAN;
        if (!(error <= tolerance<T>))
            fail("%s[%lld, %lld] is %.9g, wanted %.9g (error %.2g)", name, static_cast<long long>(i),
                 static_cast<long long>(j), got, wanted, error);
        worst_ = std::max(worst_, error);
    }

    // ---- multiplicative_update, coordinate_descent

    void sweeps(bool multiplicative) {
        const int64_t L = lanes_;
        for (int64_t k : {int64_t(7), int64_t(0), int64_t(1), int64_t(2), int64_t(3), int64_t(33)})
            for (int64_t n :
                 {9 * L + 5, int64_t(0), int64_t(1), int64_t(3), 2 * L - 1, 4 * L - 1, 4 * L, 4 * L + 1, 37 * L})
                for (int values = benign; values < values_end; ++values)
                    sweep_case(multiplicative, k, n, static_cast<Values>(values), 1 + (seed_ % 3));
        sweep_case(multiplicative, 3, 5, benign, 0);
        // To both sides of the number of features at which tiles become narrower.
        for (int64_t k : {widest_, widest_ + 1})
            for (int values : {benign, not_a_number})
                sweep_case(multiplicative, k, 4 * L + 3, static_cast<Values>(values), 1);
        begin("more features than there is memory");
        snmf::CoefficientArgs<T> impossible{};
        impossible.k = 1 << 20;
        impossible.n = impossible.sweeps = impossible.threads = 1;
        expect_status((multiplicative ? kernels_.multiplicative_update : kernels_.coordinate_descent)(impossible), 1);
    }

    void sweep_case(bool multiplicative, int64_t k, int64_t n, Values values, int sweeps) {
        const int64_t ldy = n + seed_ % 4, ldp = n + seed_ % 3, ldo = n + seed_ % 5;
        const bool in_place = seed_ % 2;
        Random random = begin("k=%lld n=%lld, %s values, %d sweeps%s", (long long)k, (long long)n, value_names[values],
                              sweeps, in_place ? ", in place" : "");
        const T eps = static_cast<T>(1e-6);
        const std::vector<T> q = gram<T>(k, values == poisoned ? benign : values, random);
        std::vector<T> y(k * n), p(k * n);
        for (T& value : y) value = draw<T>(values, random, random.uniform(0, 2));
        for (T& value : p) value = draw<T>(values, random, random.uniform(-2, 2));
        const int64_t poison = values == poisoned && n ? random.below(n) : -1;
        for (int64_t i = 0; i < k && poison >= 0; ++i) {
            p[i * n + poison] = wild<T>(random);
            y[i * n + poison] = wild<T>(random);
        }
        Buffer<T> Y("Y", y, k, n, ldy), ZtA("ZtA", p, k, n, ldp), ZtZ("ZtZ", q), separate("out", k, n, ldo);
        Buffer<T>& out = in_place ? Y : separate;
        const snmf::CoefficientArgs<T> args{Y.get(), ldy, ZtA.get(), ldp, ZtZ.get(), out.get(), out.row_stride,
                                            k, n, eps, sweeps, threads()};
        expect_status((multiplicative ? kernels_.multiplicative_update : kernels_.coordinate_descent)(args));
        out.check_padding("out");
        if (values > poisoned) return;
        const Doubles wide = widened(q);
        for (int64_t t = 0; t < n; ++t) {
            if (t == poison) continue;
            Doubles of_token(k), products(k);
            for (int64_t i = 0; i < k; ++i) {
                of_token[i] = static_cast<double>(y[i * n + t]);
                products[i] = static_cast<double>(p[i * n + t]);
            }
            for (int sweep = 0; sweep < sweeps; ++sweep)
                update_token(multiplicative, of_token.data(), products.data(), wide, k, static_cast<double>(eps));
            const double size = largest_of(of_token) + (multiplicative ? 0 : largest_of(products));
            for (int64_t i = 0; i < k; ++i) expect_close("out", i, t, out.at(i, t), of_token[i], size);
        }
    }

    // ---- winner_take_all

    void selections() {
        for (int64_t d : {7, 1, 2, 3, 16, 33, 64, 67, 130})
            for (int64_t k : {3, 0, 1, 7})
                for (int64_t count : {(d + 2) / 3, int64_t(1), d - 1, d})
                    for (int values = benign; values < values_end; ++values)
                        if (count > 0) select_case(d, k, count, static_cast<Values>(values));
        select_case(0, 3, 0, benign);
        begin("more neurons than there is memory");
        expect_status(kernels_.winner_take_all({nullptr, 1, 1, int64_t(1) << 40, 1, 1, nullptr, nullptr, 2}), 1);
    }

    void select_case(int64_t d, int64_t k, int64_t count, Values values) {
        const int layout = seed_ % layouts;
        Random random = begin("d=%lld k=%lld count=%lld, layout %d, %s values", (long long)d, (long long)k,
                              (long long)count, layout, value_names[values]);
        const Strides strides = strides_of(layout, d, k);
        Buffer<T> Z("Z", d, k, strides.row, strides.column), chosen("values", k, count, count);
        Buffer<int64_t> indices("indices", k, count, count);
        const bool ties = random.chance(0.5);
        for (int64_t row = 0; row < d; ++row)
            for (int64_t i = 0; i < k; ++i)
                Z.put(row, i, draw<T>(values, random, ties ? random.sixteenths() : random.uniform(-2, 2)));
        expect_status(kernels_.winner_take_all({Z.get(), strides.row, strides.column, d, k, count, indices.get(),
                                                chosen.get(), threads()}));
        for (int64_t i = 0; i < k; ++i) {
            Doubles column(d);
            for (int64_t row = 0; row < d; ++row) column[row] = static_cast<double>(Z.at(row, i));
            const std::vector<int64_t> wanted = largest(column, count, 0, nullptr);
            for (int64_t s = 0; s < count; ++s) {
                if (indices.at(i, s) != wanted[s])
                    fail("indices[%lld, %lld] is %lld, wanted %lld", (long long)i, (long long)s,
                         (long long)indices.at(i, s), (long long)wanted[s]);
                const T got = chosen.at(i, s), original = Z.at(wanted[s], i);
                if (std::memcmp(&got, &original, sizeof(T)) != 0)
                    fail("values[%lld, %lld] is not that of Z", (long long)i, (long long)s);
            }
        }
    }

    // ---- sparse_product

    void products() {
        const int64_t W = 8 * lanes_;
        for (int layout = 0; layout < layouts; ++layout)
            for (DType type : {DType::f32, DType::f64, DType::f16, DType::bf16})
                for (int64_t n : {W + 5, int64_t(1), W})
                    product_case(67, n, 5, 9, type, layout, benign);
        for (int64_t d : {1, 2, 3, 5, 64, 65, 130})
            for (int64_t n : {int64_t(0), int64_t(2), W - 1, 2 * W + 1})
                for (int64_t k : {0, 1, 3, 11})
                    for (int64_t count : {int64_t(1), d}) any_product_case(d, n, k, count, benign);
        for (int values = zeros; values < values_end; ++values)
            for (int repeat = 0; repeat < 8; ++repeat) any_product_case(37, W + 3, 5, 6, static_cast<Values>(values));
        any_product_case(0, 3, 2, 0, benign);
        any_product_case(5, 3, 2, 0, benign);
        for (int layout : {0, 2, 4}) every_half(layout);
        begin("more neurons than there is memory");
        expect_status(kernels_.sparse_product({nullptr, DType::f32, 1, 1, int64_t(1) << 40, 1, nullptr, nullptr, 1, 1,
                                               nullptr, 2}), 1);
    }

    // Features of one neuron each give back what A holds: the conversion is exact, NaN stays NaN.
    void every_half(int layout) {
        const int64_t d = 67, n = (1 << 16) / d + 1;
        begin("every half, layout %d", layout);
        Activations A(DType::f16, layout, d, n);
        for (int64_t e = 0; e < d * n; ++e) A.put_half(e / n, e % n, static_cast<uint16_t>(e));
        std::vector<int64_t> rows(d);
        for (int64_t row = 0; row < d; ++row) rows[row] = row;
        Buffer<int64_t> indices("indices", rows);
        Buffer<T> kept("values", std::vector<T>(d, T(1))), out("out", d, n, n);
        expect_status(kernels_.sparse_product({A.get(), DType::f16, A.strides.row, A.strides.column, d, n, indices.get(),
                                               kept.get(), d, 1, out.get(), threads()}));
        for (int64_t row = 0; row < d; ++row)
            for (int64_t t = 0; t < n; ++t) {
                const double got = static_cast<double>(out.at(row, t)), wanted = A.at(row, t);
                if (got != wanted && !(std::isnan(got) && std::isnan(wanted)))
                    fail("half %04x is read as %g", static_cast<unsigned>((row * n + t) & 0xffff), got);
            }
    }

    void any_product_case(int64_t d, int64_t n, int64_t k, int64_t count, Values values) {
        product_case(d, n, k, count, static_cast<DType>(seed_ % 4), (seed_ / 4) % layouts, values);
    }

    // Fills A; `poison` is the token to poison, or -1.
    static void fill(Activations& A, Values values, int64_t poison, Random& random) {
        for (int64_t row = 0; row < A.d; ++row)
            for (int64_t t = 0; t < A.n; ++t) {
                const Values of_token = t == poison ? anything : values;
                A.put(row, t, static_cast<double>(draw<float>(of_token, random, random.sixteenths())));
            }
    }

    void product_case(int64_t d, int64_t n, int64_t k, int64_t count, DType type, int layout, Values values) {
        Random random = begin("d=%lld n=%lld k=%lld count=%lld, element type %d, layout %d, %s values", (long long)d,
                              (long long)n, (long long)k, (long long)count, static_cast<int>(type), layout,
                              value_names[values]);
        Activations A(type, layout, d, n);
        // A token or neuron that was expanded is everywhere.
        const int64_t poison = values == poisoned && A.strides.column ? random.below(n) : -1;
        fill(A, values, poison, random);
        Features<T> Z(d, k, count, random);
        if (values > poisoned)
            for (T& value : Z.values) value = draw<T>(values, random, static_cast<double>(value));
        Buffer<int64_t> indices("indices", Z.indices);
        Buffer<T> kept("values", Z.values), out("out", k, n, n);
        expect_status(kernels_.sparse_product({A.get(), type, A.strides.row, A.strides.column, d, n, indices.get(),
                                               kept.get(), k, count, out.get(), threads()}));
        if (values > poisoned) return;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t t = 0; t < n; ++t) {
                if (t == poison) continue;
                double sum = 0, size = 0;
                for (int64_t s = 0; s < count; ++s) {
                    const double term = static_cast<double>(Z.values[i * count + s]) * A.at(Z.at(i, s), t);
                    sum += term;
                    size += std::fabs(term);
                }
                expect_close("out", i, t, out.at(i, t), sum, size);
            }
    }

    // ---- coefficient_pass

    enum Option {
        row_scale = 1, shift = 2, token_weights = 4, AYt = 8, feature_norms = 16, residual = 32, all_options = 63
    };
    enum class Stop { never, at_once, in_time };  // when coordinate descent finds its tolerance met

    struct PassCase {
        int64_t d = 19, n = 0, k = 5, count = 4, max_active = 2;
        bool multiplicative = false;
        int options = all_options;
        DType type = DType::f32;
        int layout = 0;
        Values values = benign;
        // Small integers: all arithmetic is exact, and there are many ties.
        bool exact = false;
        Stop stop = Stop::never;
    };

    void passes() {
        const int64_t L = lanes_, W = 4 * L;
        PassCase plain;
        plain.type = sizeof(T) == 4 ? DType::f32 : DType::f64;
        plain.n = 2 * W;
        pass_case(plain);
        for (int options = 0; options <= all_options; ++options)
            for (bool multiplicative : {false, true}) {
                PassCase c = plain;
                c.options = options;
                c.multiplicative = multiplicative;
                c.n = options % 3 == 0 ? W : options % 3 == 1 ? 2 * W + 5 : L + 1;
                c.type = static_cast<DType>(seed_ % 4);
                c.layout = (seed_ / 4) % layouts;
                pass_case(c);
            }
        for (int layout = 0; layout < layouts; ++layout)
            for (DType type : {DType::f32, DType::f64, DType::f16, DType::bf16})
                for (bool whole : {false, true}) {
                    PassCase c;
                    c.d = 67;
                    c.n = whole ? W : W + 3;
                    c.layout = layout;
                    c.type = type;
                    c.options = whole ? all_options - residual : static_cast<int>(seed_ % 64);
                    c.multiplicative = seed_ % 3 == 0;
                    pass_case(c);
                }
        for (int64_t k : {0, 1, 2, 9})
            for (int64_t n : {int64_t(0), int64_t(1), int64_t(3), 2 * L, W - 1, W, W + 1, 11 * W + 2})
                for (int64_t d : {1, 3, 65}) {
                    PassCase c;
                    c.k = k, c.n = n, c.d = d;
                    c.count = seed_ % 2 ? d : 1;
                    c.options = static_cast<int>(seed_ * 7 % 64);
                    c.multiplicative = seed_ % 3 == 0;
                    c.type = static_cast<DType>(seed_ % 4);
                    c.layout = (seed_ / 4) % layouts;
                    pass_case(c);
                }
        for (bool multiplicative : {false, true})
            for (bool exact : {false, true})
                for (int64_t max_active : {1, 2, 3, 4, 5, 7}) {
                    if (multiplicative && exact) continue;  // a square root is not
                    PassCase c = plain;
                    c.max_active = max_active;
                    c.multiplicative = multiplicative;
                    c.exact = exact;
                    c.n = W + 7;
                    pass_case(c);
                }
        for (Stop stop : {Stop::at_once, Stop::in_time})
            for (int64_t n : {int64_t(3), 5 * W + 1}) {
                PassCase c = plain;
                c.stop = stop;
                c.n = n;
                c.options = all_options - (stop == Stop::in_time ? feature_norms : 0);
                pass_case(c);
            }
        for (int values = zeros; values < values_end; ++values)
            for (bool multiplicative : {false, true})
                for (int repeat = 0; repeat < 6; ++repeat) {
                    PassCase c = plain;
                    c.values = static_cast<Values>(values);
                    c.multiplicative = multiplicative;
                    c.n = W + 5;
                    c.type = static_cast<DType>(seed_ % 4);
                    c.layout = (seed_ / 4) % layouts;
                    if (repeat % 2) c.options = static_cast<int>(seed_ * 5 % 64);
                    pass_case(c);
                }
        for (bool multiplicative : {false, true})
            for (int64_t k : {widest_, widest_ + 1})
                for (int values : {benign, not_a_number}) {
                    PassCase c = plain;
                    c.k = k;
                    c.n = W + 3;
                    c.multiplicative = multiplicative;
                    c.values = static_cast<Values>(values);
                    pass_case(c);
                }
        for (bool multiplicative : {false, true})
            for (DType type : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
                PassCase c = plain;
                c.k = widest_ + 1;
                c.n = 3;
                c.multiplicative = multiplicative;
                c.type = type;
                pass_case(c);
            }
        begin("more than there is memory");
        Buffer<double> sums("sums", snmf::sum_count);
        Buffer<T> one("ZtZ", 1);
        one.put(0, 0, T(1));
        snmf::PassArgs<T> impossible{};
        impossible.sums = sums.get();
        impossible.ZtZ = one.get();
        impossible.d = impossible.n = impossible.k = impossible.count = impossible.threads = 1;
        impossible.AYt = one.get();
        for (int size = 0; size < 3; ++size) {
            snmf::PassArgs<T> args = impossible;
            (size == 0 ? args.k : size == 1 ? args.d : args.count) = int64_t(1) << (size == 0 ? 20 : 40);
            expect_status(kernels_.coefficient_pass(args), 1);
        }
    }

    // What a pass reads, in the kernel's type.
    struct PassData {
        std::vector<T> q, y, residual_values, row_scale, shift, token_weights, norms;
    };
    // What it should give. *_size: of the terms that were added up.
    struct PassAnswer {
        Doubles y, AYt, AYt_size, sums = Doubles(snmf::sum_count), sums_size = Doubles(snmf::sum_count);
        bool close = false;  // a choice of features that rounding may turn
    };

    static PassData pass_data(const PassCase& c, Features<T>& Z, int64_t poison, Random& random) {
        PassData data;
        const Values values = c.values == poisoned ? benign : c.values;
        data.q = gram<T>(c.k, values, random);
        const auto filled = [&](int64_t count, double low, double high, int integers) {
            std::vector<T> array(count);
            for (T& value : array) {
                const double usual = random.uniform(low, high);
                value = c.exact ? static_cast<T>(random.below(integers)) : draw<T>(values, random, usual);
            }
            return array;
        };
        data.y = filled(c.k * c.n, 0, 2, 4);
        data.row_scale = filled(c.k, 0.5, 2, 3);
        data.shift = filled(c.k, 0, 0.3, 2);
        data.token_weights = filled(c.n, 0, 2, 3);
        data.norms = filled(c.k, 0.5, 2, 3);
        if (c.stop == Stop::at_once) std::fill(data.y.begin(), data.y.end(), T(0));
        for (int64_t i = 0; i < c.k && poison >= 0; ++i) data.y[i * c.n + poison] = wild<T>(random);
        for (T& value : Z.values) {
            if (c.exact) value = static_cast<T>(random.below(3) - 1);
            else if (c.values > poisoned) value = draw<T>(values, random, static_cast<double>(value));
            data.residual_values.push_back(value * T(2));
        }
        for (int64_t i = 0; i < c.k && c.exact; ++i)
            for (int64_t j = 0; j < c.k; ++j)
                data.q[i * c.k + j] = static_cast<T>(i == j ? 1 + random.below(2) : random.below(3) - 1);
        return data;
    }

    static PassAnswer pass_answer(const PassCase& c, const Features<T>& Z, const Activations& A, const PassData& data,
                                  int sweeps, double eps) {
        const int64_t k = c.k;
        const Doubles q = widened(data.q);
        PassAnswer answer;
        answer.y.resize(k * c.n);
        answer.AYt.resize(k * c.count);
        answer.AYt_size.resize(k * c.count);
        const auto add = [&](snmf::Sum sum, double term, double size) {
            answer.sums[sum] += term;
            answer.sums_size[sum] += size;
        };
        const bool limited = (c.options & feature_norms) && c.max_active < k;
        for (int64_t t = 0; t < c.n; ++t) {
            Doubles y(k), p(k);
            for (int64_t i = 0; i < k; ++i) {
                y[i] = static_cast<double>(data.y[i * c.n + t]);
                if (c.options & row_scale) y[i] *= static_cast<double>(data.row_scale[i]);
                for (int64_t s = 0; s < c.count; ++s)
                    p[i] += static_cast<double>(Z.values[i * c.count + s]) * A.at(Z.at(i, s), t);
                if (c.options & shift) p[i] -= static_cast<double>(data.shift[i]);
            }
            for (int round = 0; round < (limited ? 2 : 1); ++round) {
                if (round) {
                    Doubles contributions(k);
                    for (int64_t i = 0; i < k; ++i) contributions[i] = static_cast<double>(data.norms[i]) * y[i];
                    const double band = c.exact ? 0 : 20 * tolerance<T>;
                    const auto stay = largest(contributions, c.max_active, band, &answer.close);
                    for (int64_t i = 0; i < k; ++i)
                        if (!std::binary_search(stay.begin(), stay.end(), i) || !(contributions[i] > 0))
                            y[i] = 0, p[i] = -1e30;
                }
                for (int sweep = 0; sweep < sweeps; ++sweep)
                    update_token(c.multiplicative, y.data(), p.data(), q, k, eps);
            }
            const double weight = c.options & token_weights ? static_cast<double>(data.token_weights[t]) : 1;
            for (int64_t i = 0; i < k; ++i) {
                answer.y[i * c.n + t] = y[i];
                add(snmf::sum_dot, weight * p[i] * y[i], std::fabs(weight * p[i] * y[i]));
                add(snmf::sum_norm, y[i] * y[i], y[i] * y[i]);
                const double diagonal = q[i * k + i];
                if (!c.multiplicative && diagonal > 0) {
                    double gradient = -p[i], size = std::fabs(p[i]);
                    for (int64_t j = 0; j < k; ++j) {
                        gradient += q[i * k + j] * y[j];
                        size += std::fabs(q[i * k + j] * y[j]);
                    }
                    const double step = gradient / diagonal, least = std::min(step, y[i]);
                    const double at_most = step > y[i] ? y[i] : y[i] + size / diagonal;
                    add(snmf::sum_violation, least * least, at_most * at_most);
                }
                for (int64_t s = 0; s < c.count; ++s) {
                    const double term = weight * y[i] * A.at(Z.at(i, s), t);
                    answer.AYt[i * c.count + s] += term;
                    answer.AYt_size[i * c.count + s] += std::fabs(term);
                }
            }
            // Without features there is no pointer that asks for it.
            if (!(c.options & residual) || k == 0) continue;
            Doubles rest(c.d), size(c.d);
            for (int64_t row = 0; row < c.d; ++row) {
                rest[row] = A.at(row, t);
                size[row] = std::fabs(rest[row]);
                add(snmf::sum_data, weight * rest[row] * rest[row], weight * rest[row] * rest[row]);
            }
            for (int64_t e = 0; e < k * c.count; ++e) {
                const double term = static_cast<double>(data.residual_values[e]) * y[e / c.count];
                rest[Z.indices[e]] -= term;
                size[Z.indices[e]] += std::fabs(term);
            }
            for (int64_t row = 0; row < c.d; ++row)
                add(snmf::sum_residual, weight * rest[row] * rest[row], weight * size[row] * size[row]);
        }
        answer.sums[snmf::sum_sweeps] = c.n ? sweeps * (limited ? 2 : 1) : 0;
        return answer;
    }

    void pass_case(const PassCase& c) {
        const int64_t d = c.d, n = c.n, k = c.k, ldy = n + seed_ % 4, ldo = n + seed_ % 5;
        const bool in_place = seed_ % 2, compared = c.values <= poisoned;
        const int sweeps = c.stop != Stop::never ? 60 : c.exact ? 1 : 1 + seed_ % 3;
        const T eps = static_cast<T>(1e-6);
        // A test of both: a tolerance that the first sweep meets, and one that some later sweep does.
        const T in_time = 4 * std::numeric_limits<T>::epsilon();
        const T tol = c.stop == Stop::never ? T(0) : c.stop == Stop::at_once ? T(1000) : in_time;
        for (int attempt = 0;; ++attempt) {
            Random random = begin(
                "d=%lld n=%lld k=%lld count=%lld, %s, options %d, at most %lld, element type %d, layout %d, "
                "%s values%s, %d sweeps, tol %g%s", (long long)d, (long long)n, (long long)k, (long long)c.count,
                c.multiplicative ? "multiplicative" : "descent", c.options, (long long)c.max_active,
                static_cast<int>(c.type), c.layout, value_names[c.values], c.exact ? " and exact" : "", sweeps,
                static_cast<double>(tol), in_place ? ", in place" : "");
            Activations A(c.type, c.layout, d, n);
            const int64_t poison = c.values == poisoned && A.strides.column ? random.below(n) : -1;
            fill(A, c.values, poison, random);
            Features<T> Z(d, k, c.count, random);
            PassData data = pass_data(c, Z, poison, random);
            // The first tile is done before the others, and must not speak for them.
            for (int64_t t = 0; t < 4 * lanes_ && c.stop == Stop::in_time && n > 4 * lanes_; ++t) {
                for (int64_t row = 0; row < d; ++row) A.put(row, t, 0);
                for (int64_t i = 0; i < k; ++i) data.y[i * n + t] = T(0);
            }
            const PassAnswer answer = pass_answer(c, Z, A, data, c.stop == Stop::at_once ? 1 : sweeps,
                                                  static_cast<double>(eps));
            if (compared && answer.close && attempt < most_attempts) continue;
            if (compared && answer.close) fail("no data without a close choice of features");
            return run_pass(c, A, Z, data, answer, ldy, ldo, in_place, sweeps, eps, tol, poison);
        }
    }

    void run_pass(const PassCase& c, const Activations& A, const Features<T>& Z, const PassData& data,
                  const PassAnswer& answer, int64_t ldy, int64_t ldo, bool in_place, int sweeps, T eps, T tol,
                  int64_t poison) {
        const int64_t n = c.n, k = c.k;
        Buffer<int64_t> indices("indices", Z.indices);
        Buffer<T> kept("values", Z.values), ZtZ("ZtZ", data.q), Y("Y", data.y, k, n, ldy), separate("out", k, n, ldo);
        Buffer<T>& out = in_place ? Y : separate;
        Buffer<T> scale("row_scale", data.row_scale), shifts("shift", data.shift), norms("feature_norms", data.norms);
        Buffer<T> weights("token_weights", data.token_weights), products("AYt", k, c.count, c.count);
        Buffer<T> residual_values("residual_values", data.residual_values);
        Buffer<double> sums("sums", snmf::sum_count);
        const auto optional = [&](Option option, Buffer<T>& buffer) {
            return c.options & option ? buffer.get() : nullptr;
        };
        snmf::PassArgs<T> args{};
        args.A = A.get();
        args.a_type = c.type;
        args.row_stride = A.strides.row;
        args.column_stride = A.strides.column;
        args.d = c.d;
        args.n = n;
        args.indices = indices.get();
        args.values = kept.get();
        args.k = k;
        args.count = c.count;
        args.ZtZ = ZtZ.get();
        args.Y = Y.get();
        args.ldy = ldy;
        args.out = out.get();
        args.ldo = out.row_stride;
        args.row_scale = optional(row_scale, scale);
        args.shift = optional(shift, shifts);
        args.token_weights = optional(token_weights, weights);
        args.AYt = optional(AYt, products);
        args.feature_norms = optional(feature_norms, norms);
        args.max_active = c.options & feature_norms ? c.max_active : 0;
        args.residual_values = optional(residual, residual_values);
        args.sums = sums.get();
        args.eps = eps;
        args.tol = tol;
        args.sweeps = sweeps;
        args.multiplicative = c.multiplicative;
        args.measure = calls_ % 4 != 0;
        args.threads = threads();
        expect_status(kernels_.coefficient_pass(args));
        out.check_padding("out");
        if (c.values > poisoned) return;
        const double size = largest_of(answer.y) + 1;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t t = 0; t < n; ++t)
                if (t != poison) expect_close("out", i, t, out.at(i, t), answer.y[i * n + t], size);
        if (poison >= 0) return;
        if (args.AYt && n)
            for (int64_t e = 0; e < k * c.count; ++e)
                expect_close("AYt", e / c.count, e % c.count, products.at(e / c.count, e % c.count), answer.AYt[e],
                             answer.AYt_size[e]);
        for (int s = 0; s < snmf::sum_sweeps; ++s) {
            const bool wanted = s != snmf::sum_violation || args.measure;
            expect_close("sums", 0, s, sums.at(0, s), wanted ? answer.sums[s] : 0, wanted ? answer.sums_size[s] : 0);
        }
        const double swept = sums.at(0, snmf::sum_sweeps);
        if (c.stop == Stop::in_time ? swept < 2 || swept >= sweeps : swept != answer.sums[snmf::sum_sweeps])
            fail("%g sweeps, wanted %g", swept, answer.sums[snmf::sum_sweeps]);
    }

    // ---- column_descent

    void column_descents() {
        for (int64_t d : {19, 1, 2, 64, 67})
            for (int64_t k : {5, 0, 1, 2, 9})
                for (int64_t count : {(d + 3) / 4, int64_t(1), d})
                    for (int values = benign; values < values_end; ++values) {
                        column_case(d, k, count, 1 + seed_ % 3, static_cast<Values>(values), false);
                        if (values == benign) column_case(d, k, count, 1, benign, true);
                    }
        column_case(5, 3, 2, 0, benign, false);
        column_case(0, 3, 0, 1, benign, false);
        begin("more neurons than there is memory");
        expect_status(kernels_.column_descent({nullptr, nullptr, nullptr, nullptr, int64_t(1) << 40, 1, 1, 1}), 1);
    }

    // exact: small integers, of which many are equal.
    void column_case(int64_t d, int64_t k, int64_t count, int sweeps, Values values, bool exact) {
        for (int attempt = 0;; ++attempt) {
            Random random = begin("d=%lld k=%lld count=%lld, %d sweeps, %s values%s", (long long)d, (long long)k,
                                  (long long)count, sweeps, value_names[values], exact ? " and exact" : "");
            bool close = false;
            const bool compared = values <= zeros;
            std::vector<T> q = gram<T>(k, values == poisoned ? benign : values, random), products(k * d);
            for (T& value : products)
                value = exact ? static_cast<T>(random.below(7) - 3)
                              : draw<T>(values == poisoned && random.chance(0.1) ? anything : values, random,
                                        random.uniform(-2, 2));
            Features<T> Z(d, k, count, random);
            for (T& value : Z.values) {
                if (exact) value = static_cast<T>(random.below(3) - 1);
                if (values > poisoned) value = draw<T>(values, random, static_cast<double>(value));
            }
            for (int64_t i = 0; i < k && exact; ++i)
                for (int64_t j = 0; j < k; ++j)
                    q[i * k + j] = static_cast<T>(i == j ? 1 + random.below(2) : random.below(3) - 1);
            std::vector<int64_t> rows = Z.indices;
            Doubles wanted = widened(Z.values), sizes(k, 1);
            for (int sweep = 0; sweep < sweeps && compared; ++sweep)
                for (int64_t i = 0; i < k; ++i) {
                    const double diagonal = static_cast<double>(q[i * k + i]);
                    if (!(diagonal > 0)) continue;
                    Doubles rest(d);
                    for (int64_t row = 0; row < d; ++row) rest[row] = static_cast<double>(products[i * d + row]);
                    for (int64_t j = 0; j < k; ++j)
                        for (int64_t e = j * count; e < (j + 1) * count && j != i; ++e)
                            rest[rows[e]] -= static_cast<double>(q[i * k + j]) * wanted[e];
                    const auto stay = largest(rest, count, exact ? 0 : 20 * tolerance<T>, &close);
                    for (int64_t s = 0; s < count; ++s) {
                        rows[i * count + s] = stay[s];
                        wanted[i * count + s] = rest[stay[s]] / diagonal;
                    }
                    sizes[i] = largest_of(rest) / diagonal;
                }
            if (close && attempt < most_attempts) continue;
            if (close) fail("no data without a close choice of neurons");
            Buffer<T> YYt("YYt", q), AYt("AYt", products), kept("values", Z.values);
            Buffer<int64_t> indices("indices", Z.indices);
            expect_status(kernels_.column_descent(
                {YYt.get(), AYt.get(), indices.get(), kept.get(), d, k, count, sweeps}));
            for (int64_t e = 0; e < k * count; ++e) {
                const int64_t row = indices.at(0, e);
                if (compared ? row != rows[e] : row < 0 || row >= d)
                    fail("indices[%lld, %lld] is %lld, wanted %lld", (long long)(e / count), (long long)(e % count),
                         (long long)row, (long long)rows[e]);
                if (compared)
                    expect_close("values", e / count, e % count, kept.at(0, e), wanted[e], sizes[e / count]);
            }
            return;
        }
    }

    // ---- ridge_solve

    enum class System { definite, singular, indefinite, broken };

    void ridge_solves() {
        const int64_t L = lanes_;
        for (int64_t k : {5, 0, 1, 2, 4, 8, 13})
            for (int64_t m : {int64_t(3), int64_t(0), int64_t(1), 2 * L - 1, 2 * L, 2 * L + 1})
                for (int64_t batch : {int64_t(3), int64_t(0), int64_t(1), L - 1, L, 2 * L + 3})
                    ridge_case(batch, k, m, seed_ % 3 ? System::definite : static_cast<System>(seed_ % 4));
        for (System system : {System::singular, System::indefinite, System::broken})
            for (int64_t batch : {int64_t(1), 2 * L + 1})
                for (int repeat = 0; repeat < 3; ++repeat) ridge_case(batch, 6, 2 * L + 3, system);
        ridge_case(2 * L + 1, 43, 2, System::definite);
        // The first size at which systems are no longer interleaved.
        const auto large = static_cast<int64_t>(std::sqrt(1024.0 * 1024.0 / static_cast<double>(vector_bytes_))) + 1;
        ridge_case(L + 1, large, 2, System::definite);
        begin("larger systems than there is memory");
        Buffer<int32_t> info("info", 1);
        expect_status(
            kernels_.ridge_solve({nullptr, nullptr, nullptr, info.get(), 1, 1 << 20, 1, {T(1), 0, T(0)}, 2}), 1);
    }

    // With ridges enough, too few and none to follow. The floor lies above the precision of both types.
    snmf::Ladder<T> some_ladder(System system, Random& random) {
        const T ridge = system == System::singular ? T(0) : static_cast<T>(0.25);
        return {ridge, static_cast<int>(random.below(4)), static_cast<T>(random.chance(0.5) ? 0.125 : 0x1p-10)};
    }

    void ridge_case(int64_t batch, int64_t k, int64_t m, System system) {
        Random random = begin("batch=%lld k=%lld m=%lld, systems of kind %d", (long long)batch, (long long)k,
                              (long long)m, static_cast<int>(system));
        const snmf::Ladder<T> ladder = some_ladder(system, random);
        Buffer<T> G("G", batch, k * k, k * k), B("B", batch, k * m, k * m), X("X", batch, k * m, k * m);
        Buffer<int32_t> info("info", batch);
        std::vector<Doubles> systems, right_sides;
        for (int64_t b = 0; b < batch; ++b) {
            std::vector<T> g = gram<T>(k, benign, random);
            // Every other system is as it should be, and must be solved.
            const int64_t at = k && b % 2 == 0 ? random.below(k) : -1;
            for (int64_t j = 0; j < k && at >= 0; ++j) {
                if (system == System::singular) g[at * k + j] = g[j * k + at] = T(0);
                if (system == System::broken) g[at * k + j] = g[j * k + at] = wild<T>(random);
            }
            if (system == System::indefinite && at >= 0) g[at * k + at] = T(-2);
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < k; ++j)
                    // Only the lower triangle may be read.
                    G.put(b, i * k + j, j <= i ? g[i * k + j] : std::numeric_limits<T>::quiet_NaN());
            Doubles right(k * m);
            for (int64_t e = 0; e < k * m; ++e) {
                B.put(b, e, static_cast<T>(random.uniform(-2, 2)));
                right[e] = static_cast<double>(B.at(b, e));
            }
            systems.push_back(widened(g));
            right_sides.push_back(right);
        }
        expect_status(kernels_.ridge_solve({G.get(), B.get(), X.get(), info.get(), batch, k, m, ladder, threads()}));
        for (int64_t b = 0; b < batch; ++b) {
            if (system == System::broken && b % 2 == 0) continue;
            Doubles x = right_sides[b];
            const int32_t wanted = k && m ? climb(systems[b], k, ladder, x, m) : 0;
            check_solution(b, info.at(0, b), wanted, k * m, x, [&](int64_t e) { return X.at(b, e); });
        }
    }

    template <typename Solution>
    void check_solution(int64_t system, int32_t info, int32_t wanted, int64_t size, const Doubles& x,
                        Solution solution) {
        if (info != wanted) fail("info[%lld] is %d, wanted %d", (long long)system, info, wanted);
        for (int64_t e = 0; e < size; ++e) {
            if (wanted <= 0) expect_close("X", system, e, solution(e), x[e], largest_of(x));
            else if (!std::isnan(solution(e))) fail("X[%lld] of a failed system holds a number", (long long)system);
        }
    }

    // ---- support_solve

    void support_solves() {
        for (int64_t k : {7, 1, 2, 3, 17})
            for (int64_t d : {11, 0, 1, 2, 67})
                for (double density : {0.5, 0.0, 0.1, 1.0})
                    for (System system : {System::definite, System::singular, System::indefinite, System::broken})
                        support_case(d, k, density, system);
        support_case(5, 0, 0.5, System::definite);
        begin("larger systems than there is memory");
        Buffer<int64_t> offsets("offsets", {0, 1 << 20});
        expect_status(kernels_.support_solve({nullptr, offsets.get(), nullptr, nullptr, nullptr, nullptr, 1 << 20, 1,
                                              {T(1), 0, T(0)}, 2}), 1);
    }

    void support_case(int64_t d, int64_t k, double density, System system) {
        Random random = begin("d=%lld k=%lld, supports of %g k, systems of kind %d", (long long)d, (long long)k,
                              density, static_cast<int>(system));
        const snmf::Ladder<T> ladder = some_ladder(system, random);
        std::vector<T> g = gram<T>(k, benign, random);
        const int64_t at = k && system != System::definite ? random.below(k) : -1;
        for (int64_t j = 0; j < k && at >= 0; ++j) {
            if (system == System::singular) g[at * k + j] = g[j * k + at] = T(0);
            if (system == System::broken) g[at * k + j] = g[j * k + at] = wild<T>(random);
        }
        if (system == System::indefinite && at >= 0) g[at * k + at] = T(-2);
        std::vector<int64_t> offsets{0}, members;
        for (int64_t r = 0; r < d; ++r) {
            const size_t first = members.size();
            for (int64_t i = 0; i < k; ++i)
                if (random.chance(density)) members.push_back(i);
            // Any order will do.
            for (size_t e = first; r % 2 && e < members.size(); ++e)
                std::swap(members[e], members[e + random.below(static_cast<int64_t>(members.size() - e))]);
            offsets.push_back(static_cast<int64_t>(members.size()));
        }
        std::vector<T> right(members.size());
        for (T& value : right) value = static_cast<T>(random.uniform(-2, 2));
        Buffer<T> G("G", g), B("B", right), X("X", static_cast<int64_t>(members.size()));
        Buffer<int64_t> starts("offsets", offsets), features("members", members);
        Buffer<int32_t> info("info", d);
        expect_status(kernels_.support_solve({G.get(), starts.get(), features.get(), B.get(), X.get(), info.get(), k, d,
                                              ladder, threads()}));
        for (int64_t r = 0; r < d; ++r) {
            const int64_t first = offsets[r], size = offsets[r + 1] - first;
            if (system == System::broken &&
                std::count(members.begin() + first, members.begin() + first + size, at))
                continue;
            Doubles part(size * size), x(right.begin() + first, right.begin() + first + size);
            for (int64_t i = 0; i < size; ++i)
                for (int64_t j = 0; j < size; ++j)
                    part[i * size + j] = static_cast<double>(g[members[first + i] * k + members[first + j]]);
            const int32_t wanted = climb(part, size, ladder, x, 1);
            check_solution(r, info.at(0, r), wanted, size, x, [&](int64_t e) { return X.at(0, first + e); });
        }
    }
};

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) return std::puts(snmf::supported_levels()) < 0;
    const char* level = arguments[1];
    if (!snmf::set_level(level)) return std::printf("no level %s here\n", level), 2;
    if (count > 2) {
        const std::string text = arguments[2];
        const size_t colon = text.find(':'), dot = std::min(text.find('.'), text.size());
        fault.kind = text.substr(0, colon);
        fault.kernel = text.substr(colon + 1, dot - colon - 1);
        fault.argument = text.substr(std::min(dot + 1, text.size()));
    }
    // Lines must not be lost when a sanitizer ends the process.
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    const int64_t vector_bytes = std::strcmp(level, "v4") == 0 ? 64 : std::strcmp(level, "v3") == 0 ? 32 : 16;
    Suite<float>(level, vector_bytes).run();
    Suite<double>(level, vector_bytes).run();
    return 0;
}
