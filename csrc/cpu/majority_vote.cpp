// Majority vote over the answers of each prompt.
//
// Fused: grouping, counting, tie rule, shares and margin, in one read of the ids [B, G]. Small groups compare every
// pair in vectors, without a branch; in others, equal ids are found in a hash table that is not cleared between
// prompts, so that the cost grows as G, not as G^2.
#include "majority_vote.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace mgrpo {
namespace {

constexpr int64_t kNobody = -1;

// One answer of a prompt.
struct Class {
  int64_t id;
  int64_t votes;
  int64_t preferred;  // votes that decide a tie
  int64_t earliest;   // index of the first voter, or kNobody
};

// Scratch of one thread.
class Ballot {
 public:
  explicit Ballot(int64_t group) : classes_(group), class_of_(group) {
    int bits = 3;
    while ((int64_t{1} << bits) < 2 * group) ++bits;
    slots_.resize(size_t{1} << bits, Slot{kNobody, 0});
    shift_ = 64 - bits;
  }

  void count(const MajorityVote& args, int64_t prompt) {
    num_classes_ = total_ = 0;
    for (int64_t g = 0; g < args.group; ++g) {
      const int64_t i = prompt * args.group + g, id = args.answer_ids[i], votes = votes_of(args, i);
      total_ += votes;
      class_of_[g] = id < 0 ? kNobody : find(id, prompt);
      if (id < 0 || votes == 0) continue;
      Class& own = classes_[class_of_[g]];
      if (own.votes == 0) own.earliest = g;
      own.votes += votes;
      if (args.tie_break && args.tie_break[i]) own.preferred += votes;
    }
  }

  void write(const MajorityVote& args, int64_t prompt) const {
    const Class none = {kNobody, 0, 0, kNobody};
    const Class* winner = &none;
    int64_t second = 0;
    for (int64_t c = 0; c < num_classes_; ++c) {
      const Class& own = classes_[c];
      if (own.votes == 0) continue;
      const bool wins = winner == &none || beats(own, *winner);
      second = std::max(second, wins ? winner->votes : own.votes);
      if (wins) winner = &own;
    }
    args.label[prompt] = winner->id;
    args.share[prompt] = share(winner->votes);
    args.margin[prompt] = share(winner->votes - second);
    args.tie[prompt] = winner->votes != 0 && winner->votes == second;
    float* class_share = args.class_share + prompt * args.group;
    for (int64_t g = 0; g < args.group; ++g) {
      class_share[g] = class_of_[g] == kNobody ? 0.0f : share(classes_[class_of_[g]].votes);
    }
  }

 private:
  struct Slot {
    int64_t prompt;  // that wrote it; to any other prompt the slot is empty
    int64_t index;   // of the class
  };

  static int64_t votes_of(const MajorityVote& args, int64_t i) {
    if (args.keep && !args.keep[i]) return 0;
    if (!args.weights) return 1;
    const int64_t weight = args.wide_weights ? static_cast<const int64_t*>(args.weights)[i]
                                             : static_cast<const int32_t*>(args.weights)[i];
    return std::max<int64_t>(weight, 0);
  }

  static bool beats(const Class& a, const Class& b) {
    if (a.votes != b.votes) return a.votes > b.votes;
    if (a.preferred != b.preferred) return a.preferred > b.preferred;
    return a.earliest < b.earliest;
  }

  float share(int64_t votes) const {
    return static_cast<float>(votes) / static_cast<float>(std::max<int64_t>(total_, 1));
  }

  // The class of an answer, a new one where it is the first of its kind. Fibonacci hashing, linear probing.
  int64_t find(int64_t id, int64_t prompt) {
    size_t at = (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> shift_;
    while (slots_[at].prompt == prompt) {
      if (classes_[slots_[at].index].id == id) return slots_[at].index;
      at = (at + 1) & (slots_.size() - 1);
    }
    slots_[at] = {prompt, num_classes_};
    classes_[num_classes_] = {id, 0, 0, kNobody};
    return num_classes_++;
  }

  std::vector<Class> classes_;     // [G], the first num_classes_ in use
  std::vector<int64_t> class_of_;  // [G], index of each rollout's class, or kNobody
  std::vector<Slot> slots_;        // a power of two >= 2 G
  int shift_;
  int64_t num_classes_ = 0;
  int64_t total_ = 0;  // votes of all kept rollouts
};

// The least value if one may be below `allowed` <= 0, else 0: the first pass looks at sign bits alone, in vectors.
template <typename T, typename U>
int64_t least(const void* data, int64_t count, T allowed) {
  const T* values = static_cast<const T*>(data);
  U signs = 0;
  for (int64_t i = 0; i < count; ++i) signs |= static_cast<U>(values[i]) - static_cast<U>(allowed);
  return static_cast<T>(signs) < 0 ? *std::min_element(values, values + count) : 0;
}

}  // namespace

void launch_majority_vote(const MajorityVote& args) {
  const int64_t count = args.num_prompts * args.group, num_weights = args.weights ? count : 0;
  args.lowest[0] = least<int64_t, uint64_t>(args.answer_ids, count, -1);
  args.lowest[1] = args.wide_weights ? least<int64_t, uint64_t>(args.weights, num_weights, 0)
                                     : least<int32_t, uint32_t>(args.weights, num_weights, 0);
  const auto vote_small = selection().kernels->majority_vote_small;
#pragma omp parallel num_threads(args.executor) if (count >= kLeastParallelWork)
  {
    Ballot ballot(args.group);
#pragma omp for schedule(static)
    for (int64_t prompt = 0; prompt < args.num_prompts; ++prompt) {
      if (vote_small(args, prompt)) continue;
      ballot.count(args, prompt);
      ballot.write(args, prompt);
    }
  }
}

}  // namespace mgrpo
