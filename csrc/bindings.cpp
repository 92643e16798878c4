// One Python function per launcher. Pointers come as integers, 0 for none; native.py has checked all that they point
// to. The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "cpu/group_advantage.h"
#include "cpu/iqr_filter.h"
#include "cpu/kernels.h"
#include "cpu/majority_vote.h"
#include "cpu/trajectory_entropy.h"

namespace py = pybind11;
using namespace mgrpo;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

LogitRows logit_rows(Address logits, int dtype, int64_t num_rows, int64_t vocabulary, int64_t stride, Address targets,
                     Address mask, Address temperatures, float temperature, float softcap) {
  return {at<void>(logits), static_cast<Dtype>(dtype), num_rows, vocabulary, stride, at<int64_t>(targets),
          at<bool>(mask), at<float>(temperatures), temperature, softcap};
}

void token_logprob_fwd(const LogitRows& rows, Address logprob, Address entropy, Address lse, Address self_certainty,
                       Address num_finite, int num_threads) {
  selection().kernels->token_logprob_fwd({rows, at<float>(logprob), at<float>(entropy), at<float>(lse),
                                          at<float>(self_certainty), at<float>(num_finite), num_threads});
}

void token_logprob_bwd(const LogitRows& rows, Address logprob, Address entropy, Address lse, Address num_finite,
                       Address dlogprob, Address dentropy, Address dlse, Address dself_certainty, Address dlogits,
                       int64_t dlogits_stride, int num_threads) {
  selection().kernels->token_logprob_bwd({rows, at<float>(logprob), at<float>(entropy), at<float>(lse),
                                          at<float>(num_finite), at<float>(dlogprob), at<float>(dentropy),
                                          at<float>(dlse), at<float>(dself_certainty), at<void>(dlogits),
                                          dlogits_stride, num_threads});
}

// Columns of integers of one length, one entry a tensor.
void ema_update(const py::list& momentum, const py::list& policy, const py::list& compensation,
                const py::list& publish, const py::list& counts, const py::list& momentum_dtypes,
                const py::list& policy_dtypes, const py::list& publish_dtypes, double weight, bool stochastic,
                uint64_t seed, uint32_t step, int num_threads) {
  const auto number = [](const py::list& column, size_t i) {
    return PyLong_AsLongLong(PyList_GET_ITEM(column.ptr(), static_cast<Py_ssize_t>(i)));
  };
  const auto pointer = [&](const py::list& column, size_t i) {
    return at<void>(static_cast<Address>(number(column, i)));
  };
  const auto dtype = [&](const py::list& column, size_t i) { return static_cast<Dtype>(number(column, i)); };
  std::vector<EmaTensor> tensors(momentum.size());
  int64_t num_groups = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = {pointer(momentum, i), pointer(policy, i), pointer(compensation, i), pointer(publish, i),
                  number(counts, i), num_groups, dtype(momentum_dtypes, i), dtype(policy_dtypes, i),
                  dtype(publish_dtypes, i)};
    num_groups += (tensors[i].count + kEmaGroup - 1) / kEmaGroup;
  }
  const py::gil_scoped_release unlocked;
  selection().kernels->ema_update({tensors.data(), static_cast<int64_t>(tensors.size()), num_groups, weight, stochastic,
                                   seed, step, num_threads});
}

void trajectory_entropy_fwd(Address tokens, int dtype, Address cu_seqlens, Address mask, int64_t num_sequences,
                            int64_t num_tokens, bool mean, Address entropy, int num_threads) {
  launch_trajectory_entropy_fwd(
      {at<int64_t>(cu_seqlens), at<bool>(mask), num_sequences, num_tokens, mean, num_threads}, at<void>(tokens),
      static_cast<Dtype>(dtype), at<float>(entropy));
}

void trajectory_entropy_bwd(Address dentropy, int dtype, Address cu_seqlens, Address mask, int64_t num_sequences,
                            int64_t num_tokens, bool mean, Address dtokens, int num_threads) {
  launch_trajectory_entropy_bwd(
      {at<int64_t>(cu_seqlens), at<bool>(mask), num_sequences, num_tokens, mean, num_threads}, at<float>(dentropy),
      static_cast<Dtype>(dtype), at<void>(dtokens));
}

void group_advantage(Address rewards, Address keep, int64_t num_prompts, int64_t group, int mode, Address advantage,
                     int num_threads) {
  launch_group_advantage({at<float>(rewards), at<bool>(keep), num_prompts, group, static_cast<AdvantageMode>(mode),
                          at<float>(advantage), num_threads});
}

void majority_vote(Address answer_ids, Address keep, Address weights, bool wide_weights, Address tie_break,
                   int64_t num_prompts, int64_t group, Address label, Address share, Address margin, Address tie,
                   Address class_share, Address lowest, int num_threads) {
  launch_majority_vote({at<int64_t>(answer_ids), at<bool>(keep), at<void>(weights), wide_weights, at<bool>(tie_break),
                        num_prompts, group, at<int64_t>(label), at<float>(share), at<float>(margin), at<bool>(tie),
                        at<float>(class_share), at<int64_t>(lowest), num_threads});
}

void iqr_filter(Address entropy, Address keep, int64_t num_scopes, int64_t scope_size, float k, bool two_sided,
                Address kept, Address q1, Address q3, int num_threads) {
  launch_iqr_filter({at<float>(entropy), at<bool>(keep), num_scopes, scope_size, k, two_sided, at<bool>(kept),
                     at<float>(q1), at<float>(q3), num_threads});
}

LinearHead linear_head(Address hidden, Address weight, Address bias, int dtype, int64_t num_tokens,
                       int64_t hidden_size, int64_t vocabulary, int64_t hidden_stride, int64_t weight_stride,
                       Address targets, Address temperatures, float temperature, float softcap, int64_t budget_bytes,
                       int num_threads) {
  return {at<void>(hidden), at<void>(weight), at<float>(bias), static_cast<Dtype>(dtype), num_tokens, hidden_size,
          vocabulary, hidden_stride, weight_stride, at<int64_t>(targets), at<float>(temperatures), temperature,
          softcap, budget_bytes, selection().level, num_threads};
}

void linear_token_logprob_fwd(const LinearHead& head, Address top, Address exp, Address exp_x, Address finite_x,
                              Address num_finite, Address z_target) {
  const bool done = selection().kernels->linear_token_logprob_fwd(
      {head, at<float>(top), at<float>(exp), at<float>(exp_x), at<float>(finite_x), at<float>(num_finite),
       at<float>(z_target)});
  if (!done) throw std::bad_alloc();
}

void linear_token_logprob_bwd(const LinearHead& head, Address lse, Address constant, Address onehot, Address slope,
                              Address uniform, Address dhidden, int dhidden_dtype, int64_t dhidden_stride,
                              Address dweight, int64_t dweight_stride, Address dbias) {
  const bool done = selection().kernels->linear_token_logprob_bwd(
      {head, at<float>(lse), at<float>(constant), at<float>(slope), at<float>(onehot), at<float>(uniform),
       at<void>(dhidden), static_cast<Dtype>(dhidden_dtype), dhidden_stride, at<void>(dweight), dweight_stride,
       at<float>(dbias)});
  if (!done) throw std::bad_alloc();
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
                         float denominator) {
  return {ratio_low, ratio_high, dual_clip, kl_coef, static_cast<KlEstimate>(kl), entropy_coef, tis_cap,
          sequence_ratio, sequence_mean, count_tokens, denominator};
}

// What the losses need beside their outputs.
struct LossBuffers {
  explicit LossBuffers(const LossTokens& tokens)
      : sums((tokens.num_tokens + kLossChunk - 1) / kLossChunk * (1 + kNumMetrics)),
        sequences(2 * tokens.num_sequences) {}
  LossScratch scratch() { return {sums.data(), sequences.data()}; }
  std::vector<double> sums;
  std::vector<float> sequences;
};

void grpo_loss_fwd(const LossTokens& tokens, const LossOptions& options, Address loss, Address metrics,
                   Address dlogprob, Address dentropy, int num_threads) {
  LossBuffers buffers(tokens);
  selection().kernels->grpo_loss_fwd(
      {tokens, options, buffers.scratch(),
       {at<float>(loss), at<float>(metrics), at<float>(dlogprob), at<float>(dentropy)}, num_threads});
}

void logits_grpo_loss_fwd(const LogitRows& rows, const LossTokens& tokens, const LossOptions& options, Address loss,
                          Address metrics, Address logprob, Address entropy, Address lse, Address dlogprob,
                          Address dentropy, Address dlogits, int num_threads) {
  LossBuffers buffers(tokens);
  selection().kernels->logits_grpo_loss_fwd(
      {rows, tokens, options, buffers.scratch(),
       {at<float>(loss), at<float>(metrics), at<float>(dlogprob), at<float>(dentropy)}, at<float>(logprob),
       at<float>(entropy), at<float>(lse), at<void>(dlogits), num_threads});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of mgrpo_kernels.";
  selection();  // a wrong MGRPO_CPU_ISA is an error of the import
  m.def("isa", [] { return selection().name; }, "Name of the instruction set in use.");

  py::class_<LogitRows>(m, "LogitRows").def(py::init(&logit_rows));
  m.def("token_logprob_fwd", &token_logprob_fwd, Unlocked());
  m.def("token_logprob_bwd", &token_logprob_bwd, Unlocked());
  py::class_<LossTokens>(m, "LossTokens").def(py::init(&loss_tokens));
  py::class_<LossOptions>(m, "LossOptions").def(py::init(&loss_options));
  m.def("grpo_loss_fwd", &grpo_loss_fwd, Unlocked());
  m.def("logits_grpo_loss_fwd", &logits_grpo_loss_fwd, Unlocked());
  py::class_<LinearHead>(m, "LinearHead").def(py::init(&linear_head));
  m.def("linear_token_logprob_fwd", &linear_token_logprob_fwd, Unlocked());
  m.def("linear_token_logprob_bwd", &linear_token_logprob_bwd, Unlocked());
  m.def("trajectory_entropy_fwd", &trajectory_entropy_fwd, Unlocked());
  m.def("trajectory_entropy_bwd", &trajectory_entropy_bwd, Unlocked());
  m.def("group_advantage", &group_advantage, Unlocked());
  m.def("majority_vote", &majority_vote, Unlocked());
  m.def("iqr_filter", &iqr_filter, Unlocked());
  m.def("ema_update", &ema_update);
}
