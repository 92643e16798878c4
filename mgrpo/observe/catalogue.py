"""Every metric of a step."""

from __future__ import annotations

# Keys that every row has, null where one does not apply.
KEYS = (
    *("step", "loss", "reward_mean", "majority_share", "top_answer_share", "token_entropy", "response_length"),
    *("unparseable_share", "zero_signal_share", "pruned_share", "tie_share", "vote_agreement", "truncated_share"),
    *("distinct_answers", "pruned_length", "kept_length", "nonfinite_steps", "tis_mean", "tis_clipped_share"),
    *("logprob_gap", "kl", "kl_initial", "grad_norm", "lr", "tokens_per_s", "step_s", "time_rollout_s"),
    *("time_rollout_policy_s", "time_rollout_momentum_s", "time_score_s", "time_vote_s", "time_update_s"),
    *("time_ema_s", "time_publish_s", "time_checkpoint_s", "vote_accuracy", "probe_accuracy_policy"),
    *("probe_accuracy_momentum", "retention", "rollbacks", "time_monitor_s", "alarm"),
)
