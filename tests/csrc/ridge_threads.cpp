// Runs the device's solve (csrc/ridge.hpp) with host threads as lanes and real barriers, and compares with a plain one.
// Prints the worst relative residual and exits 0, or says what is wrong and exits 1. Built and run by
// tests/test_ridge_threads.py, also under ThreadSanitizer.
#include <pthread.h>

#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "ridge.hpp"

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
};

// Solves with teams x lanes threads; returns each thread's answer, which must agree.
template <typename T>
std::vector<int> solve(const std::vector<T>& G, const std::vector<T>& B, std::vector<T>& X, int k, int64_t m, T ridge,
                       int teams, int lanes) {
    std::vector<T> workspace(snmf::ridge_workspace(k, m), T(NAN));
    std::vector<Barrier*> team_barriers;
    for (int team = 0; team < teams; ++team) team_barriers.push_back(new Barrier(lanes));
    Barrier all(teams * lanes);
    std::vector<int> info(teams * lanes, -1);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < teams * lanes; ++rank)
        threads.emplace_back([&, rank] {
            ThreadGroup group{rank % lanes, lanes, rank / lanes, teams, team_barriers[rank / lanes], &all};
            info[rank] = snmf::ridge_solve_group(group, G.data(), B.data(), X.data(), k, m, static_cast<int>(m), ridge,
                                                 workspace.data());
        });
    for (auto& thread : threads) thread.join();
    for (auto* barrier : team_barriers) delete barrier;
    return info;
}

template <typename T>
bool check(int k, int64_t m, int teams, int lanes, double tolerance, double* worst) {
    std::mt19937 random(k * 1000 + m);
    std::normal_distribution<double> normal;
    std::vector<T> factor(k * (k + 2)), G(k * k), B(k * m), X(k * m, T(NAN));
    for (T& value : factor) value = static_cast<T>(normal(random));
    for (T& value : B) value = static_cast<T>(normal(random));
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            T sum = 0;
            for (int p = 0; p < k + 2; ++p) sum += factor[i * (k + 2) + p] * factor[j * (k + 2) + p];
            G[i * k + j] = j <= i ? sum / k : T(NAN);  // only the lower triangle may be read
        }
    const T ridge = T(0.5);
    for (int answer : solve(G, B, X, k, m, ridge, teams, lanes))
        if (answer != 0) return std::printf("k=%d: info %d, wanted 0\n", k, answer), false;
    for (int64_t c = 0; c < m; ++c)
        for (int i = 0; i < k; ++i) {
            double sum = -static_cast<double>(B[i * m + c]), size = std::fabs(sum);
            for (int j = 0; j < k; ++j) {
                const double g = (j <= i ? G[i * k + j] : G[j * k + i]) + (i == j ? ridge : T(0));
                sum += g * X[j * m + c];
                size += std::fabs(g * X[j * m + c]);
            }
            if (!(std::fabs(sum) / size <= tolerance)) return std::printf("k=%d: residual %g\n", k, sum / size), false;
            if (std::fabs(sum) / size > *worst) *worst = std::fabs(sum) / size;
        }
    // A pivot that is not positive is named by all threads, and the result is NaN.
    const int bad = k / 2;
    G[bad * k + bad] = -100 * k;
    for (int answer : solve(G, B, X, k, m, ridge, teams, lanes))
        if (answer != bad + 1) return std::printf("k=%d: info %d, wanted %d\n", k, answer, bad + 1), false;
    for (T value : X)
        if (value == value) return std::printf("k=%d: a failed system left a number\n", k), false;
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
    std::printf("worst residual %g\n", worst);
    return 0;
}
