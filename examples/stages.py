"""Each stage of M-GRPO as a function, in one step of plain PyTorch: `python examples/stages.py`.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N, L response tokens, D hidden, V vocabulary.
"""

import torch

from mgrpo.grading import AnswerChecker, make_extractor
from mgrpo_kernels import (
    ema_update_,
    group_advantage,
    grpo_loss,
    iqr_filter,
    linear_token_logprob,
    majority_vote,
    token_logprob,
    trajectory_entropy,
)

B, M, N, L, D, V = 4, 6, 2, 12, 32, 500
G = M + N
torch.manual_seed(0)

# Any model with hidden states and a head; replace it with your language model.
policy = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False))
momentum = [p.detach().clone() for p in policy.parameters()]
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
tokens = torch.randint(V, (B * G, L + 1))  # rollouts: M of the policy, then N of the momentum model, for each prompt
mask = torch.arange(L) < torch.randint(4, L + 1, (B * G, 1))  # True at response tokens
texts = [[f"so the answer is \\boxed{{{(b + i // 3) % 3}}}" for i in range(G)] for b in range(B)]

# 1. Log-prob and entropy of every token in one pass, from logits ...
logits = policy(tokens[:, :-1])
out = token_logprob(logits.view(-1, V), tokens[:, 1:].reshape(-1), temperature=1.1)

# ... or from hidden states, without the logits.
hidden = policy[0](tokens[:, :-1]).view(-1, D)
fused = linear_token_logprob(hidden, policy[1].weight, tokens[:, 1:].reshape(-1), temperature=1.1)
torch.testing.assert_close(fused.logprob, out.logprob)

# 2. Entropy of each trajectory, and the filter of those with unusually low entropy.
entropy = trajectory_entropy(out.entropy.detach().view(B * G, L), mask=mask).view(B, G)
keep = iqr_filter(entropy, k=0.75, scope="batch").keep

# 3. Classes of equivalent answers, and the majority of each prompt.
extract = make_extractor("boxed")
with AnswerChecker(mode="exact") as checker:
    answer_ids = torch.tensor(checker.group_classes([[extract(text) for text in row] for row in texts]))
is_momentum = (torch.arange(G) >= M).expand(B, G)
vote = majority_vote(answer_ids, keep=keep, tie_break=is_momentum)

# 4. Rewards, and advantages of the policy's kept rollouts.
rewards = ((answer_ids == vote.label[:, None]) & (answer_ids >= 0)).float()
trains = keep & ~is_momentum
advantage = group_advantage(rewards, keep=trains)

# 5. The clipped loss; `normalizer` lets micro-batches add up to the loss of the optimiser step.
trained = mask & trains.view(-1, 1)
loss, metrics = grpo_loss(
    out.logprob.view(B * G, L), advantage.view(-1), trained, clip_low=0.2, clip_high=0.2, normalizer=trained.sum()
)
loss.backward()
optimizer.step()

# 6. The momentum model moves by one hundredth of its distance to the policy.
ema_update_(momentum, [p.detach() for p in policy.parameters()], 0.99)
print(f"loss {loss.item():.4f}  kept {keep.float().mean():.2f}  labels {vote.label.tolist()}")
print(f"clipped {float(metrics['clip_high_share']):.2f}")
