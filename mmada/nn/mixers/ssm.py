"""State-space layers: Mamba (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060).

Both are: project; convolve over the last few tokens; scan; gate; project back. What is scanned, with what steps and
decays, is the *core*, in one form per paper.

# B batch, T tokens, D model, I inner channels, N state size, H heads, P head width, G groups of heads, K kernel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache, State
from mmada.nn.causal_conv import CausalConv
from mmada.nn.context import Context
from mmada.nn.precision import wide
from mmada.nn.selective_scan import selective_scan
from mmada.nn.ssd import ssd

A_RANGE = (1.0, 16.0)  # of -A in Mamba-2 at the start, uniform


class SSM(nn.Module):
    """A state-space layer in the form that ``config.ssm.form`` names; its state goes by ``state_name``."""

    def __init__(self, config: MMaDAConfig, layer_idx: int, state_name: str = "ssm") -> None:
        super().__init__()
        self.config, self.layer_idx, self.state_name = config, layer_idx, state_name
        self.core: SSDCore | SelectiveScanCore = CORES[config.ssm.form](config)
        self.inner_size = config.ssm.inner_size(config)
        widths = self.inner_size + self.core.conv_size + self.core.step_size
        self.in_proj = nn.Linear(config.hidden_size, widths, bias=False)
        self.conv1d = CausalConv(self.core.conv_size, config.ssm.conv_kernel)
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, None]:
        """Mix (B, T, D) along T; the state in ``past_key_values``, where one is given, moves on."""
        if past_key_values is None:
            return self._scan(hidden_states, None, context)[0], None
        part = past_key_values.layers[self.layer_idx].recurrent(self.state_name)
        return part.run(self._scan, hidden_states, context), None

    def _scan(self, hidden_BTD: Tensor, state: State | None, context: Context) -> tuple[Tensor, State]:
        state = state or {}
        z_BTI, conv_BTC, step_BTS = self.in_proj(hidden_BTD).split(
            [self.inner_size, self.core.conv_size, self.core.step_size], dim=-1
        )
        conv_BTC, after_BKC = self.conv1d(conv_BTC, state.get("conv"), context)
        y_BTI, scanned = self.core(silu(conv_BTC), step_BTS, z_BTI, state.get("scan"), context)
        return self.out_proj(y_BTI), {"conv": after_BKC, "scan": scanned}


class SelectiveScanCore(nn.Module):
    """Mamba: a decay for every channel and number of the state; Δ, B and C from the convolved channels."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        ssm, inner = config.ssm, config.ssm.inner_size(config)
        self.conv_size, self.step_size = inner, 0
        time_step_rank = math.ceil(config.hidden_size / 16)
        self.split_sizes = [time_step_rank, ssm.state_size, ssm.state_size]
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = TimeStepProjection(time_step_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, ssm.state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.init_own_weights(config)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Mark A, also where it is a new one from a checkpoint: its logarithm is no matrix to be decayed towards 0."""
        super().register_parameter(name, param)
        if name == "A_log" and param is not None:
            param._no_weight_decay = True  # type: ignore[attr-defined]

    def init_own_weights(self, config: MMaDAConfig) -> None:
        numbers_N = torch.arange(1, self.A_log.shape[1] + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, numbers_N.log().expand_as(self.A_log))
        init.ones_(self.D)

    def forward(
        self, x_BTI: Tensor, step_BTS: Tensor, z_BTI: Tensor, state_BIN: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor]:
        """The gated output (B, T, I), and the state (B, I, N)."""
        low_BTR, B_BTN, C_BTN = self.x_proj(x_BTI).split(self.split_sizes, dim=-1)
        y_BTI, state_BIN = selective_scan(
            x_BTI,
            time_steps(self.dt_proj(low_BTR), context),
            -wide(self.A_log).exp(),
            B_BTN,
            C_BTN,
            self.D,
            state_BIN,
            document_starts(context),
        )
        return (y_BTI * silu(wide(z_BTI))).to(z_BTI.dtype), state_BIN


class TimeStepProjection(nn.Linear):
    """From the low rank of Δ to a logit per channel."""

    def init_own_weights(self, config: MMaDAConfig) -> None:
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        init_time_step_bias(self.bias, config)


class SSDCore(nn.Module):
    """Mamba-2: a decay for every head; B and C are convolved, too, and groups of heads share them."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        ssm, inner = config.ssm, config.ssm.inner_size(config)
        self.num_heads, self.num_groups, self.chunk_size = inner // ssm.head_dim, ssm.num_groups, ssm.chunk_size
        self.split_sizes = [inner, ssm.num_groups * ssm.state_size, ssm.num_groups * ssm.state_size]
        self.conv_size, self.step_size = sum(self.split_sizes), self.num_heads
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedRMSNorm(inner, ssm.num_groups, config.rms_norm_eps)
        self.init_own_weights(config)

    def init_own_weights(self, config: MMaDAConfig) -> None:
        init_time_step_bias(self.dt_bias, config)
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*A_RANGE).log())
        init.ones_(self.D)

    def forward(
        self, conv_BTC: Tensor, step_BTH: Tensor, z_BTI: Tensor, state_BHPN: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor]:
        """The gated and normed output (B, T, I), and the state (B, H, P, N)."""
        x_BTI, B_BTX, C_BTX = conv_BTC.split(self.split_sizes, dim=-1)
        y_BTHP, state_BHPN = ssd(
            x_BTI.unflatten(-1, (self.num_heads, -1)),
            time_steps(wide(step_BTH) + self.dt_bias, context),
            -wide(self.A_log).exp(),
            B_BTX.unflatten(-1, (self.num_groups, -1)),
            C_BTX.unflatten(-1, (self.num_groups, -1)),
            self.D,
            state_BHPN,
            document_starts(context),
            chunk_size=self.chunk_size,
        )
        return self.norm(y_BTHP.flatten(2), z_BTI), state_BHPN


class GatedRMSNorm(nn.Module):
    """RMSNorm of y · SiLU(z), each group of heads by itself; the norm comes after the gate."""

    def __init__(self, width: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(width))  # transformers starts norms at 1, by the name of their class

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """The normed (B, T, I), in the dtype of ``z_BTI``."""
        gated = (y_BTI * silu(wide(z_BTI))).unflatten(-1, (self.num_groups, -1))
        normed = nn.functional.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(z_BTI.dtype)


CORES: dict[str, type[SSDCore] | type[SelectiveScanCore]] = {"ssd": SSDCore, "selective_scan": SelectiveScanCore}


def time_steps(logits_BTX: Tensor, context: Context) -> Tensor:
    """Δ = softplus, and 0 at padding, which leaves the state as it is."""
    dt_BTX = softplus(wide(logits_BTX))
    valid_BT = context.valid_BT()
    return dt_BTX if valid_BT is None else dt_BTX.masked_fill(~valid_BT[..., None], 0.0)


def document_starts(context: Context) -> Tensor | None:
    """True at the first token of every document but the first, (B, T); None where rows hold one."""
    documents_BT = context.documents_BT
    if documents_BT is None:
        return None
    return nn.functional.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))


def init_time_step_bias(bias: Tensor, config: MMaDAConfig) -> None:
    """softplus(bias) log-uniform between ``time_step_min`` and ``time_step_max``."""
    ssm = config.ssm
    low, high = math.log(ssm.time_step_min), math.log(ssm.time_step_max)
    dt = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high).exp_()
    dt.clamp_(min=ssm.time_step_floor)
    init.copy_(bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
