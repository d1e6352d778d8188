// Chooses the instruction level at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.hpp"

namespace snmf {
namespace {

#if defined(__x86_64__)
// Not __builtin_cpu_supports, to which clang 14 knows no such feature.
bool has_f16c() {
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

std::vector<const KernelTable*> available_tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    std::vector<const KernelTable*> tables{&table_v2};
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && has_f16c();
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v3) tables.push_back(&table_v3);
    if (v4) tables.push_back(&table_v4);
    return tables;
#else
    return {&table_baseline};
#endif
}

const KernelTable* find_table(const char* name) {
    for (const KernelTable* table : available_tables())
        if (std::strcmp(table->name, name) == 0) return table;
    return nullptr;
}

const KernelTable* initial_table() {
    const auto tables = available_tables();
    const char* cap = std::getenv("SNMF_CPU_ISA");
    if (!cap || !*cap) return tables.back();
    // A cap above what the machine has is no error: it caps nothing.
    for (const char* known : {"v2", "v3", "v4", "baseline"}) {
        if (std::strcmp(cap, known) != 0) continue;
        const KernelTable* table = find_table(cap);
        return table ? table : tables.back();
    }
    throw std::invalid_argument(std::string("SNMF_CPU_ISA: wanted one of v2, v3, v4, got '") + cap +
                                "'; unset it to use the best level of this processor");
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
    const KernelTable* table = current.load(std::memory_order_acquire);
    if (!table) {
        table = initial_table();
        current.store(table, std::memory_order_release);
    }
    return *table;
}

bool set_level(const char* name) {
    const KernelTable* table = find_table(name);
    if (table) current.store(table, std::memory_order_release);
    return table != nullptr;
}

const char* supported_levels() {
    static const std::string names = [] {
        std::string joined;
        for (const KernelTable* table : available_tables()) joined += (joined.empty() ? "" : ",") + std::string(table->name);
        return joined;
    }();
    return names.c_str();
}

}  // namespace snmf
