// The vote of a small group: each rollout's class is counted by comparing it with every other, in vectors of 32 bits.
#include "majority_vote.h"
#include "simd.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

// Up to here G^2 comparisons beat a hash table, which mispredicts where answers are new.
constexpr int kMostCompared = 64;
constexpr int64_t kMostVotes = INT32_MAX / kMostCompared;
static_assert(kMostCompared % kLanes == 0, "whole vectors");

MGRPO_INLINE i32v load(const int32_t* p) {
  i32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MGRPO_INLINE int32_t reduce_add(i32v v) {
  int32_t lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

MGRPO_INLINE i32v max(i32v a, i32v b) { return a > b ? a : b; }

MGRPO_INLINE int32_t reduce_max(i32v v) {
  int32_t lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// A group in 32 bits, padded with rollouts that neither answer nor vote.
struct Group {
  int32_t ids[kMostCompared];    // -1 for no answer
  int32_t votes[kMostCompared];  // 0 for no voter
  int32_t class_votes[kMostCompared];
  int size;
  int padded;
};

template <typename W>
bool read_weights(const W* weights, Group& group) {
  int wide = 0;
  for (int g = 0; g < group.size; ++g) {
    const W weight = weights[g] > 0 ? weights[g] : 0;
    wide |= weight > kMostVotes;
    group.votes[g] = static_cast<int32_t>(weight);
  }
  return !wide;
}

// False where an id or a weight does not fit.
bool read(const MajorityVote& args, int64_t start, Group& group) {
  group.size = static_cast<int>(args.group);
  group.padded = (group.size + kLanes - 1) / kLanes * kLanes;
  for (int g = group.size; g < group.padded; ++g) {
    group.ids[g] = -1;
    group.votes[g] = 0;
  }
  int wide = 0;
  for (int g = 0; g < group.size; ++g) {
    const int64_t id = args.answer_ids[start + g];
    wide |= id > INT32_MAX;
    group.ids[g] = id < 0 ? -1 : static_cast<int32_t>(id);
  }
  if (wide) return false;
  if (!args.weights) {
    for (int g = 0; g < group.size; ++g) group.votes[g] = 1;
  } else if (!(args.wide_weights ? read_weights(static_cast<const int64_t*>(args.weights) + start, group)
                                 : read_weights(static_cast<const int32_t*>(args.weights) + start, group))) {
    return false;
  }
  if (args.keep) {
    for (int g = 0; g < group.size; ++g) group.votes[g] &= -static_cast<int32_t>(args.keep[start + g]);
  }
  return true;
}

// Votes for the answer of each rollout.
void count_classes(Group& group) {
  for (int g = 0; g < group.padded; g += kLanes) {
    const i32v own = load(group.ids + g);
    i32v sum = {};
    for (int j = 0; j < group.size; ++j) sum += (own == isplat(group.ids[j])) & isplat(group.votes[j]);
    std::memcpy(group.class_votes + g, &sum, sizeof sum);
  }
}

bool leads(const Group& group, int g, int32_t top) {
  return group.ids[g] >= 0 && group.votes[g] > 0 && group.class_votes[g] == top;
}

// The first of the leading voters whose class has the most tie-breaking votes.
int winner_of_tie(const Group& group, const bool* tie_break, int first, int32_t top) {
  int winner = first;
  int32_t most = -1;
  for (int g = first; g < group.size; ++g) {
    if (!leads(group, g, top)) continue;
    int32_t preferred = 0;
    for (int j = 0; j < group.size; ++j) preferred += group.ids[j] == group.ids[g] && tie_break[j] ? group.votes[j] : 0;
    if (preferred > most) {
      winner = g;
      most = preferred;
    }
  }
  return winner;
}

}  // namespace

// False where the group is too large or its numbers too wide.
bool majority_vote_small(const MajorityVote& args, int64_t prompt) {
  Group group;
  const int64_t start = prompt * args.group;
  if (args.group > kMostCompared || !read(args, start, group)) return false;
  count_classes(group);

  i32v total = {}, most = {};
  for (int g = 0; g < group.padded; g += kLanes) {
    const i32v votes = load(group.votes + g), voters = (load(group.ids + g) >= 0) & (votes > 0);
    total += votes;
    most = max(most, voters & load(group.class_votes + g));
  }
  const int32_t sum = reduce_add(total), top = reduce_max(most);
  const float divisor = static_cast<float>(sum > 0 ? sum : 1);

  int winner = 0;
  int32_t second = 0;
  if (top > 0) {
    while (!leads(group, winner, top)) ++winner;
    i32v rest = {};
    for (int g = 0; g < group.padded; g += kLanes) {
      const i32v ids = load(group.ids + g);
      const i32v rivals = (ids >= 0) & (ids != isplat(group.ids[winner])) & (load(group.votes + g) > 0);
      rest = max(rest, rivals & load(group.class_votes + g));
    }
    second = reduce_max(rest);
    if (second == top && args.tie_break) winner = winner_of_tie(group, args.tie_break + start, winner, top);
  }
  args.label[prompt] = top > 0 ? group.ids[winner] : -1;
  args.share[prompt] = static_cast<float>(top) / divisor;
  args.margin[prompt] = static_cast<float>(top - second) / divisor;
  args.tie[prompt] = top > 0 && second == top;
  float* class_share = args.class_share + start;
  for (int g = 0; g < group.padded; g += kLanes) {
    const i32v counted = (load(group.ids + g) >= 0) & load(group.class_votes + g);
    const f32v share = __builtin_convertvector(counted, f32v) / divisor;
    const int left = group.size - g;
    if (left >= kLanes) {
      store(class_share + g, share);
    } else {
      store_part(class_share + g, share, left);
    }
  }
  return true;
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
