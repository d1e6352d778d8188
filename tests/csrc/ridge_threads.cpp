// Runs the device's solves (csrc/ridge.hpp) with host threads as lanes and real barriers, and measures residuals.
// Prints the worst relative one and exits 0, or says what is wrong and exits 1. Built and run by
// tests/test_ridge_threads.py, also under ThreadSanitizer.
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "plan.hpp"

namespace {

// Two barriers in turn. With one alone, ThreadSanitizer takes a thread that wakes late from a barrier to be ordered after those that
// have already entered it again, and is blind to races in between.
class Barrier {
  public:
    explicit Barrier(unsigned count) {
        for (auto& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, count);
    }
    ~Barrier() {
        for (auto& barrier : barriers_) pthread_barrier_destroy(&barrier);
    }
    void wait(unsigned round) { pthread_barrier_wait(&barriers_[round % 2]); }

  private:
    pthread_barrier_t barriers_[2];
};

struct ThreadGroup {
    int lane_, lanes_, team_, teams_;
    Barrier* of_team;
    Barrier* of_group;
    unsigned team_round = 0, group_round = 0;
    int lane() const { return lane_; }
    int lanes() const { return lanes_; }
    int team() const { return team_; }
    int teams() const { return teams_; }
    void team_sync() { of_team->wait(team_round++); }
    void sync() { of_group->wait(group_round++); }
    static int32_t take(int32_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
};

// Runs work(group, number of the group) in groups of teams x lanes threads, all at once.
template <typename Work>
void run_groups(int groups, int teams, int lanes, Work work) {
    std::vector<std::unique_ptr<Barrier>> of_teams, of_groups;
    std::vector<std::thread> threads;
    for (int g = 0; g < groups; ++g) of_groups.emplace_back(new Barrier(teams * lanes));
    for (int team = 0; team < groups * teams; ++team) of_teams.emplace_back(new Barrier(lanes));
    for (int rank = 0; rank < groups * teams * lanes; ++rank)
        threads.emplace_back([&, rank] {
            const int g = rank / (teams * lanes), team = rank / lanes % teams;
            ThreadGroup group{rank % lanes, lanes, team, teams, of_teams[g * teams + team].get(), of_groups[g].get()};
            work(group, g);
        });
    for (auto& thread : threads) thread.join();
}

bool complain(const char* what, int where, double got, double wanted) {
    std::printf("%s, case of size %d: got %g, wanted %g\n", what, where, got, wanted);
    return false;
}

// A symmetric positive definite matrix [k, k] in double.
std::vector<double> gram(int k, std::mt19937& random) {
    std::normal_distribution<double> normal;
    std::vector<double> factor(k * (k + 2)), G(k * k, 0.0);
    for (double& value : factor) value = normal(random);
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j)
            for (int p = 0; p < k + 2; ++p) G[i * k + j] += factor[i * (k + 2) + p] * factor[j * (k + 2) + p] / k;
    return G;
}

// Whether (G + ridge I) x = b, with g(i, j) the lower triangle of G and x(i), b(i).
template <typename Gram, typename Solution, typename Right>
bool solves(int k, Gram g, double ridge, Solution x, Right b, double tolerance, double* worst) {
    for (int i = 0; i < k; ++i) {
        double sum = -static_cast<double>(b(i)), size = std::fabs(sum);
        for (int j = 0; j < k; ++j) {
            const double term = ((j <= i ? g(i, j) : g(j, i)) + (i == j ? ridge : 0)) * static_cast<double>(x(j));
            sum += term;
            size += std::fabs(term);
        }
        if (!(std::fabs(sum) / size <= tolerance)) return complain("residual", k, std::fabs(sum) / size, 0);
        if (std::fabs(sum) / size > *worst) *worst = std::fabs(sum) / size;
    }
    return true;
}

// One system, solved by one group; what it takes and finds must be the same for all threads.
template <typename T>
bool check(int k, int64_t m, int teams, int lanes, double tolerance, double* worst) {
    std::mt19937 random(k * 1000 + m);
    std::normal_distribution<double> normal;
    const std::vector<double> exact = gram(k, random);
    std::vector<T> G(k * k), B(k * m);
    for (T& value : B) value = static_cast<T>(normal(random));
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j)
            G[i * k + j] = j <= i ? static_cast<T>(exact[i * k + j]) : T(NAN);  // which must not be read
    const int bad = k / 2;
    // The entry, how many larger ridges may follow, what the group must find, and the ridge that it takes then.
    const struct { double entry; int escalations, info; double ridge; } cases[] = {
        {1.0, 0, 0, 0.5}, {1.0, 3, 0, 0.5}, {-3.0, 0, bad + 1, 0}, {-3.0, 1, -1, 5}, {-3.0, 3, -1, 5},
        {-30.0, 1, bad + 1, 0}, {-30.0, 2, -2, 50}, {-1e6, 3, bad + 1, 0}, {NAN, 2, bad + 1, 0},
    };
    for (const auto& c : cases) {
        if (c.entry != 1.0)
            for (int j = 0; j < k; ++j) (j <= bad ? G[bad * k + j] : G[j * k + bad]) = T(j == bad ? c.entry : 0);
        std::vector<T> workspace(snmf::ridge_workspace(k, m), T(NAN)), X(k * m, T(7));
        std::vector<int> info(teams * lanes, -99);
        const snmf::Ladder<T> ladder{T(0.5), c.escalations, T(0)};
        run_groups(1, teams, lanes, [&](ThreadGroup& group, int) {
            const snmf::DenseSystem<T> system{G.data(), B.data(), X.data(), k, static_cast<int>(m), m};
            info[group.team() * lanes + group.lane()] =
                snmf::ridge_solve_group(group, system, ladder, workspace.data());
        });
        for (int found : info)
            if (found != c.info) return complain("info", k, found, c.info);
        for (int64_t column = 0; column < m; ++column) {
            if (c.info <= 0 &&
                !solves(k, [&](int i, int j) { return static_cast<double>(G[i * k + j]); }, c.ridge,
                        [&](int i) { return X[i * m + column]; }, [&](int i) { return B[i * m + column]; }, tolerance,
                        worst))
                return false;
            for (int i = 0; i < k && c.info > 0; ++i)
                if (!std::isnan(X[i * m + column])) return complain("failed, and yet", k, X[i * m + column], NAN);
        }
    }
    return true;
}

// Ragged systems: one small group for each neuron, several at a time, then several larger ones for each list.
template <typename T>
bool check_supports(double tolerance, double* worst) {
    const int k = 14, d = 90;
    const snmf::SizeClasses classes{{3, 5, 8, 12, k}, {0, 0, d, 2 * d, 3 * d}};
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    std::vector<double> exact = gram(k, random);
    // Of the last features the first needs one larger ridge, and the second more than there are.
    for (int j = 0; j < k; ++j)
        for (int i : {k - 2, k - 1}) exact[i * k + j] = exact[j * k + i] = i == j ? (i == k - 2 ? -3 : -1e6) : 0;
    const std::vector<T> G(exact.begin(), exact.end());
    std::vector<int64_t> offsets{0}, members;
    std::vector<int> wanted;
    for (int r = 0; r < d; ++r) {
        const int size = r % 2 ? r % 4 : r / 2 % (k + 1);
        std::vector<int64_t> all(k);
        for (int i = 0; i < k; ++i) all[i] = i;
        std::shuffle(all.begin(), all.end() - (r % 7 ? 2 : 0), random);
        members.insert(members.end(), all.begin(), all.begin() + size);
        offsets.push_back(static_cast<int64_t>(members.size()));
        int info = 0;
        for (int i = 0; i < size; ++i) {
            if (all[i] == k - 2 && info == 0) info = -1;
            if (all[i] == k - 1) info = i + 1;
        }
        wanted.push_back(info);
    }
    std::vector<T> B(members.size()), X(members.size(), T(7));
    for (T& value : B) value = static_cast<T>(normal(random));
    std::vector<int32_t> info(d, -99), counts(snmf::size_classes, 0), lists(4 * d, -99);
    const snmf::SupportBatch<T> batch{G.data(), k, offsets.data(), members.data(), B.data(), X.data(), info.data()};
    const snmf::Ladder<T> ladder{T(0.5), 1, T(0)};
    for (int r = 0; r < d; r += 3) {
        std::vector<T> workspace(3 * snmf::ridge_workspace(classes.limit[0], 1), T(NAN));
        run_groups(3, 1, 2, [&](ThreadGroup& group, int g) {
            snmf::support_solve_or_list(group, batch, r + g, classes, counts.data(), lists.data(), ladder,
                                        workspace.data() + g * snmf::ridge_workspace(classes.limit[0], 1));
        });
    }
    int listed = 0;
    for (int c = 1; c < snmf::size_classes; ++c) {
        if (counts[c] < 3) return complain("too few systems for the test", c, counts[c], 3);
        listed += counts[c];
        const int64_t elements = snmf::ridge_workspace(classes.limit[c], 1);
        std::vector<T> workspace(2 * elements, T(NAN));
        run_groups(2, 2, 2, [&](ThreadGroup& group, int g) {
            snmf::support_solve_listed(group, batch, lists.data() + classes.first[c], counts[c], g, 2, ladder,
                                       workspace.data() + g * elements);
        });
    }
    for (int r = 0; r < d; ++r) {
        const int64_t first = offsets[r];
        const int size = static_cast<int>(offsets[r + 1] - first);
        listed -= size > classes.limit[0];
        if (info[r] != wanted[r]) return complain("info of a support", size, info[r], wanted[r]);
        for (int i = 0; i < size && wanted[r] > 0; ++i)
            if (!std::isnan(X[first + i])) return complain("failed, and yet", size, X[first + i], NAN);
        if (wanted[r] <= 0 &&
            !solves(
                size, [&](int i, int j) { return static_cast<double>(G[members[first + i] * k + members[first + j]]); },
                wanted[r] ? 5.0 : 0.5, [&](int i) { return X[first + i]; }, [&](int i) { return B[first + i]; },
                tolerance, worst))
            return false;
    }
    return listed == 0 || complain("listed beyond those that are large", d, listed, 0);
}

// Whatever the sizes are, they find room in what was planned without them.
bool check_plan() {
    std::mt19937 random(1);
    for (int repeat = 0; repeat < 3000; ++repeat) {
        // What an A100 and an H100 have, and an older device.
        const snmf::DeviceLimits devices[] = {
            {108, 163 << 10, 164 << 10}, {132, 227 << 10, 228 << 10}, {40, 64 << 10, 64 << 10}};
        const snmf::DeviceLimits& device = devices[random() % 3];
        const int element_size = repeat % 2 ? 4 : 8, k = static_cast<int>(random() % (repeat % 3 ? 1200 : 40));
        const int d = static_cast<int>(random() % 50), busiest = static_cast<int>(random() % (k + 1));
        std::vector<int64_t> sizes(d);
        int64_t members = 0;
        for (int64_t& size : sizes) {
            size = random() % 3 ? static_cast<int64_t>(random() % (busiest + 1)) : busiest;
            members += size;
        }
        const snmf::SupportPlan plan(k, d, members, device, element_size);
        const int64_t* limit = plan.classes.limit;
        int64_t counts[snmf::size_classes] = {};
        for (int64_t size : sizes) {
            int c = 0;
            while (size > limit[c]) ++c;  // ends at k
            ++counts[c];
        }
        for (int c = 0; c < snmf::size_classes; ++c) {
            const bool in_shared = c + 1 < snmf::size_classes;
            const int64_t end = in_shared ? plan.classes.first[c + 1] : (plan.slots_at - plan.lists_at) / 4;
            if (c > 0 && limit[c] < limit[c - 1]) return complain("limits", k, limit[c], limit[c - 1]);
            if (c > 0 && counts[c] > end - plan.classes.first[c]) return complain("room", k, end, counts[c]);
            if (c > 0 && counts[c] && !plan.blocks[c]) return complain("blocks", k, 0, 1);
            if (plan.blocks[c] > d) return complain("more blocks than systems", k, plan.blocks[c], d);
            const int64_t bytes = snmf::workspace_bytes(limit[c], element_size) * (c ? 1 : 4);
            if (in_shared && bytes > device.shared_per_block) return complain("shared memory", limit[c], bytes, 0);
        }
        // A factor goes to global memory only where shared memory does not hold it.
        const int last = snmf::size_classes - 1;
        if (plan.blocks[last] && snmf::workspace_bytes(limit[last - 1] + 1, element_size) <= device.shared_per_block)
            return complain("needless slots", k, limit[last - 1], 0);
        const int64_t slots = plan.bytes - plan.slots_at;
        if (slots % snmf::slot_alignment || slots < plan.blocks[last] * snmf::workspace_bytes(k, element_size) ||
            slots > std::max(snmf::slot_budget, plan.slot_bytes))
            return complain("bytes of the slots", k, slots, plan.blocks[last]);
    }
    return true;
}

}  // namespace

int main() {
    double worst = 0;
    const int shapes[][2] = {{1, 1}, {2, 3}, {5, 1}, {17, 6}, {24, 2}};
    const int groups[][2] = {{1, 1}, {1, 4}, {3, 2}};  // teams, lanes
    for (auto& shape : shapes)
        for (auto& group : groups)
            if (!check<float>(shape[0], shape[1], group[0], group[1], 1e-5, &worst) ||
                !check<double>(shape[0], shape[1], group[0], group[1], 1e-13, &worst))
                return 1;
    if (!check_plan()) return 1;
    if (!check_supports<float>(1e-5, &worst) || !check_supports<double>(1e-13, &worst)) return 1;
    std::printf("worst residual %g\n", worst);
    return 0;
}
