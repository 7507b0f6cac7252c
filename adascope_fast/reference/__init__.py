"""The mathematics in plain PyTorch: what every kernel must equal, and the path that serves the CPU.

Axes: `n` packed (sample, step) pairs; latents come as [n, ...], in any layout, and a row is read as one vector of `d`
elements in the order in which the first of them lies in memory.
`coef` [n, 3] is (sample weight, output weight, std) of each row's step: x_next ~ N(a * sample + b * output, std^2 I).

How it differs from ddpo-pytorch and flow_grpo: no scheduler and no step index, only `coef`; float32 inside whatever
dtype the latents have (float64 if one of them is float64, for tests); `prev_sample` is rounded to its storage dtype
before its log-probability is taken, so the first update after a rollout sees a ratio of exactly 1; a row's result does
not depend on the rows beside it. A NaN stays a NaN.

`kind` names a step's log-probability: "gaussian" is the density; "squared_error" is -mean (prev_sample - mean)^2, what
Flow-CPS's code trains on: no division by std^2 and no constant, so it is defined where std = 0 too.
"""

from adascope_fast.reference.correlation import correlation as correlation
from adascope_fast.reference.correlation import correlation_from_state as correlation_from_state
from adascope_fast.reference.correlation import correlation_update as correlation_update
from adascope_fast.reference.correlation import correlations as correlations
from adascope_fast.reference.gaussian_kl import gaussian_kl as gaussian_kl
from adascope_fast.reference.policy_loss import clipped_policy_loss as clipped_policy_loss
from adascope_fast.reference.policy_loss import dpok_policy_loss as dpok_policy_loss
from adascope_fast.reference.step import Step as Step
from adascope_fast.reference.step import transition_step as transition_step
from adascope_fast.reference.step import transition_step_with_x0 as transition_step_with_x0
from adascope_fast.reference.training_step import transition_policy_grad as transition_policy_grad
from adascope_fast.reference.training_step import transition_policy_loss as transition_policy_loss
from adascope_fast.reference.transition import Kind as Kind
from adascope_fast.reference.transition import guide as guide
from adascope_fast.reference.transition import guided_transition_log_prob as guided_transition_log_prob
from adascope_fast.reference.transition import transition_log_prob as transition_log_prob
from adascope_fast.reference.transition import transition_log_prob_grad as transition_log_prob_grad
