// One Python function for each launcher of all devices. Pointers are integers, 0 for none; native.py has checked what
// they point to. The GIL is released while a kernel runs.
#include "bindings.h"

#include <vector>

#include "ema_update.h"
#include "group_advantage.h"
#include "grpo_loss.h"
#include "iqr_filter.h"
#include "majority_vote.h"
#include "trajectory_entropy.h"

namespace py = pybind11;
using namespace mgrpo;

namespace {

LogitRows logit_rows(Address logits, int dtype, int64_t num_rows, int64_t vocabulary, int64_t stride, Address targets,
                     Address mask, Address temperatures, float temperature, float softcap) {
  return {at<void>(logits), static_cast<Dtype>(dtype), num_rows, vocabulary, stride, at<int64_t>(targets),
          at<bool>(mask), at<float>(temperatures), temperature, softcap};
}

void token_logprob_fwd(const LogitRows& rows, Address logprob, Address entropy, Address lse, Address self_certainty,
                       Address num_finite, Executor executor) {
  launch_token_logprob_fwd({rows, at<float>(logprob), at<float>(entropy), at<float>(lse),
                                          at<float>(self_certainty), at<float>(num_finite), executor});
}

void token_logprob_bwd(const LogitRows& rows, Address logprob, Address entropy, Address lse, Address num_finite,
                       Address dlogprob, Address dentropy, Address dlse, Address dself_certainty, Address dlogits,
                       int64_t dlogits_stride, Executor executor) {
  launch_token_logprob_bwd({rows, at<float>(logprob), at<float>(entropy), at<float>(lse),
                                          at<float>(num_finite), at<float>(dlogprob), at<float>(dentropy),
                                          at<float>(dlse), at<float>(dself_certainty), at<void>(dlogits),
                                          dlogits_stride, executor});
}

// Columns of integers of one length, one entry a tensor; no offsets: all are 0.
void ema_update(const py::list& momentum, const py::list& policy, const py::list& compensation,
                const py::list& publish, const py::list& counts, const py::list& momentum_dtypes,
                const py::list& policy_dtypes, const py::list& publish_dtypes, double weight, Address decay,
                bool stochastic, uint64_t seed, uint32_t step, Address step_at, Executor executor,
                const py::list& offsets) {
  const auto number = [](const py::list& column, size_t i) {
    return PyLong_AsLongLong(PyList_GET_ITEM(column.ptr(), static_cast<Py_ssize_t>(i)));
  };
  const auto pointer = [&](const py::list& column, size_t i) {
    return at<void>(static_cast<Address>(number(column, i)));
  };
  const auto dtype = [&](const py::list& column, size_t i) { return static_cast<Dtype>(number(column, i)); };
  std::vector<EmaTensor> tensors(momentum.size());
  const bool has_offsets = !offsets.empty();
  int64_t num_groups = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = {pointer(momentum, i), pointer(policy, i), pointer(compensation, i), pointer(publish, i),
                  number(counts, i), num_groups, has_offsets ? static_cast<uint64_t>(number(offsets, i)) : 0,
                  dtype(momentum_dtypes, i), dtype(policy_dtypes, i), dtype(publish_dtypes, i)};
    num_groups += (tensors[i].count + kEmaGroup - 1) / kEmaGroup;
  }
  const py::gil_scoped_release unlocked;
  launch_ema_update({tensors.data(), static_cast<int64_t>(tensors.size()), num_groups, weight, at<double>(decay),
                                   stochastic, has_offsets, seed, step, at<int64_t>(step_at), executor});
}

void trajectory_entropy_fwd(Address tokens, int dtype, Address cu_seqlens, Address mask, int64_t num_sequences,
                            int64_t num_tokens, bool mean, Address entropy, Executor executor) {
  launch_trajectory_entropy_fwd(
      {at<int64_t>(cu_seqlens), at<bool>(mask), num_sequences, num_tokens, mean, executor}, at<void>(tokens),
      static_cast<Dtype>(dtype), at<float>(entropy));
}

void trajectory_entropy_bwd(Address dentropy, int dtype, Address cu_seqlens, Address mask, int64_t num_sequences,
                            int64_t num_tokens, bool mean, Address dtokens, Executor executor) {
  launch_trajectory_entropy_bwd(
      {at<int64_t>(cu_seqlens), at<bool>(mask), num_sequences, num_tokens, mean, executor}, at<float>(dentropy),
      static_cast<Dtype>(dtype), at<void>(dtokens));
}

void group_advantage(Address rewards, Address keep, int64_t num_prompts, int64_t group, int mode, Address advantage,
                     Executor executor) {
  launch_group_advantage({at<float>(rewards), at<bool>(keep), num_prompts, group, static_cast<AdvantageMode>(mode),
                          at<float>(advantage), executor});
}

void majority_vote(Address answer_ids, Address keep, Address weights, bool wide_weights, Address tie_break,
                   int64_t num_prompts, int64_t group, Address label, Address share, Address margin, Address tie,
                   Address class_share, Address lowest, Executor executor) {
  launch_majority_vote({at<int64_t>(answer_ids), at<bool>(keep), at<void>(weights), wide_weights, at<bool>(tie_break),
                        num_prompts, group, at<int64_t>(label), at<float>(share), at<float>(margin), at<bool>(tie),
                        at<float>(class_share), at<int64_t>(lowest), executor});
}

void iqr_filter(Address entropy, Address keep, int64_t num_scopes, int64_t scope_size, float k, bool two_sided,
                Address kept, Address q1, Address q3, Executor executor) {
  launch_iqr_filter({at<float>(entropy), at<bool>(keep), num_scopes, scope_size, k, two_sided, at<bool>(kept),
                     at<float>(q1), at<float>(q3), executor});
}

LossTokens loss_tokens(Address logprob, Address entropy, Address old_logprob, Address ref_logprob,
                       Address rollout_logprob, Address advantage, bool advantage_by_token, Address mask,
                       Address cu_seqlens, int64_t num_tokens, int64_t num_sequences) {
  return {at<float>(logprob), at<float>(entropy), at<float>(old_logprob), at<float>(ref_logprob),
          at<float>(rollout_logprob), at<float>(advantage), advantage_by_token, at<bool>(mask),
          at<int64_t>(cu_seqlens), num_tokens, num_sequences};
}

LossOptions loss_options(float ratio_low, float ratio_high, float dual_clip, float kl_coef, int kl, float entropy_coef,
                         float tis_cap, bool sequence_ratio, bool sequence_mean, bool count_tokens,
                         float denominator, Address normalizer) {
  return {ratio_low, ratio_high, dual_clip, kl_coef, static_cast<KlEstimate>(kl), entropy_coef, tis_cap,
          sequence_ratio, sequence_mean, count_tokens, denominator, at<float>(normalizer)};
}

LossScratch loss_scratch(Address sums, Address sequences) { return {at<double>(sums), at<float>(sequences)}; }

void grpo_loss_fwd(const LossTokens& tokens, const LossOptions& options, const LossScratch& scratch, Address loss,
                   Address metrics, Address dlogprob, Address dentropy, Executor executor) {
  launch_grpo_loss_fwd(
      {tokens, options, scratch,
       {at<float>(loss), at<float>(metrics), at<float>(dlogprob), at<float>(dentropy)}, executor});
}

void logits_grpo_loss_fwd(const LogitRows& rows, const LossTokens& tokens, const LossOptions& options,
                          const LossScratch& scratch, Address loss, Address metrics, Address logprob, Address entropy,
                          Address lse, Address dlogprob, Address dentropy, Address dlogits, Executor executor) {
  launch_logits_grpo_loss_fwd(
      {rows, tokens, options, scratch,
       {at<float>(loss), at<float>(metrics), at<float>(dlogprob), at<float>(dentropy)}, at<float>(logprob),
       at<float>(entropy), at<float>(lse), at<void>(dlogits), executor});
}

}  // namespace

// The argument types are local to a module, because two modules of one process bind them.
void bind_operations(py::module_& m) {
  py::class_<LogitRows>(m, "LogitRows", py::module_local()).def(py::init(&logit_rows));
  m.def("token_logprob_fwd", &token_logprob_fwd, Unlocked());
  m.def("token_logprob_bwd", &token_logprob_bwd, Unlocked());
  py::class_<LossTokens>(m, "LossTokens", py::module_local()).def(py::init(&loss_tokens));
  py::class_<LossOptions>(m, "LossOptions", py::module_local()).def(py::init(&loss_options));
  py::class_<LossScratch>(m, "LossScratch", py::module_local()).def(py::init(&loss_scratch));
  m.def("grpo_loss_fwd", &grpo_loss_fwd, Unlocked());
  m.def("logits_grpo_loss_fwd", &logits_grpo_loss_fwd, Unlocked());
  m.def("trajectory_entropy_fwd", &trajectory_entropy_fwd, Unlocked());
  m.def("trajectory_entropy_bwd", &trajectory_entropy_bwd, Unlocked());
  m.def("group_advantage", &group_advantage, Unlocked());
  m.def("majority_vote", &majority_vote, Unlocked());
  m.def("iqr_filter", &iqr_filter, Unlocked());
  m.def("ema_update", &ema_update, py::arg("momentum"), py::arg("policy"), py::arg("compensation"), py::arg("publish"),
        py::arg("counts"), py::arg("momentum_dtypes"), py::arg("policy_dtypes"), py::arg("publish_dtypes"),
        py::arg("weight"), py::arg("decay"), py::arg("stochastic"), py::arg("seed"), py::arg("step"),
        py::arg("step_at"), py::arg("executor"), py::arg("offsets") = py::list());
}
