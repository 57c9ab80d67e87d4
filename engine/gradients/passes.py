"""One pass of a micro-batch through a policy: log-probabilities of the responses, and their weighted gradient.

Two shortcuts save work. A prompt is run once and its key-value cache expanded to its rollouts; the gradient flows back
through the cache. The output layer runs on response positions only, one chunk at a time, so the logits of a whole batch
never exist: each chunk is back-propagated to the hidden states at once, then those together to the rest of the model.

Both shortcuts must be exact. They are compared with the model's plain forward when a model is first used. If they
differ (capped logits, a cache without gradients or of another kind), the plain forward is used, with a warning. Before
longer sequences are run, shared prompts and padding are compared again with each sequence alone (`verify`). This costs
some 8 L tokens of forward at each power of two L up to the data's length.

Dimension letters: B sequences, Q prompts, S prompt tokens, T tokens of a continuation, N response tokens, H hidden,
V vocabulary.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gradstore.engine.gradients.chosen import at_responses, chosen_logprobs
from gradstore.engine.gradients.grouped_attention import grouped_attention
from gradstore.engine.gradients.hooks import Observation, evaluating
from gradstore.engine.gradients.layers import base_of
from gradstore.engine.gradients.lengths import SHORTEST, alone, frequencies_change_at, reach, samples
from gradstore.engine.gradients.microbatch import MicroBatch, Prompts, WeightedSequence, pack
from gradstore.engine.gradients.objectives import Objective, importance_weights, kl_weights
from gradstore.engine.gradients.retrying import is_out_of_memory
from gradstore.engine.gradients.sharding import gather, is_sharded, largest, layer_by_layer, reshard
from gradstore.errors import RequestError

log = logging.getLogger(__name__)

LOGIT_BYTES, LOGIT_BYTES_ON_CPU = 1 << 28, 1 << 25
"""Bytes of float32 logits held at once; their exponentials take as many."""

_TOLERANCE = 1e-3
"""Largest difference of a log-probability, relative to 1 + |log-probability|, for a shortcut that counts as exact."""


OnWeights = Callable[[Tensor, Tensor, Tensor], None]
"""Callback(problem_B, token weights [B, N] before importance ratios, after them). If the objective has no ratios, the
rollouts' own are told all the same; where log-probabilities are not recorded, both weights are the same."""

_NOT_SUPPORTED = (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError)

_SHARING = "prompts computed once"

_HEAD = "the output layer on response positions alone"
_PADDING = "sequences padded to one length"


@dataclass
class _Checked:
    """Results of a model's exactness checks, shared by all its PolicyForward objects."""

    dtype: torch.dtype
    device: torch.device
    splits: bool = False
    shares: bool = False
    pads: bool = True
    """Whether padding leaves a sequence's log-probabilities unchanged."""
    length: int = 0
    """Tokens of the longest sequences checked so far."""
    fallbacks: list[str] = field(default_factory=list)


_CHECKED: WeakKeyDictionary[nn.Module, _Checked] = WeakKeyDictionary()


class PolicyForward:
    """A causal LM as backbone and output layer; uses only the shortcuts that are exact for it."""

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self.model = model
        self._by_layer = False
        self._backbone = cast(Any, base).base_model
        self._head = cast(Any, base).get_output_embeddings()
        self.n_vocabulary = int(cast(Any, base).get_input_embeddings().num_embeddings)
        config = getattr(base, "config", None)
        self._context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._changes_at = frequencies_change_at(config)
        weight = next(model.parameters())
        known = _CHECKED.get(model)
        if known is not None and (known.dtype, known.device) == (weight.dtype, weight.device):
            self._checked = known
        else:
            self._checked = known = _Checked(weight.dtype, weight.device)
            known.splits = self._caps_nothing(config) and self._is_exact(_HEAD, self._hidden_then_head)
            known.shares = known.splits and self._attends_fully(base) and self._is_exact(_SHARING, self._cached)
            _CHECKED[model] = known
        self._split, self.shares_prompts = known.splits, known.shares

    @property
    def fallbacks(self) -> list[str]:
        """Shortcuts that are not exact for this model, with reasons."""
        return self._checked.fallbacks

    def verify(self, rollouts: Sequence[WeightedSequence]) -> None:
        """Check shared prompts and padding at the rollouts' lengths; call it before reading `shares_prompts`.

        If sharing is not exact, it is switched off. If padding is not exact, sequences are run one by one. Under FSDP2
        all ranks call this together; RequestError if sequences would have to run one by one.
        """
        known, longest = self._checked, largest(self.model, reach(rollouts))
        if self._changes_at and longest > self._changes_at:
            # Decided by the configuration: the other frequencies may change less than a comparison can detect.
            reason = f"forwards of more than {self._changes_at} tokens use other rotary frequencies (longrope)"
            for what, taken in ((_SHARING, known.shares), (_PADDING, known.pads)):
                if taken:
                    self._fall_back(what, reason)
            known.shares = known.pads = False
        while known.length < longest and known.device.type != "meta" and (known.shares or known.pads):
            length = max(SHORTEST, 2 * known.length)
            self._verify_at(min(length, self._context or length))
            known.length = length
        self.shares_prompts = known.shares
        if not known.pads and is_sharded(self.model):
            raise RequestError(
                f"{type(self.model).__name__}: a sequence's log-probabilities depend on what it is padded to, "
                "and a sharded model runs padded sequences only: run it unsharded"
            )

    def _verify_at(self, length: int) -> None:
        known, rollouts = self._checked, samples(length, self.n_vocabulary)
        (unshared,) = pack(rollouts, 8 * length, shared=False)
        (shared,) = pack(rollouts, 8 * length, shared=True)
        with self._as_checked():
            plain = self._chosen(alone(unshared.to(known.device)))
            for what, batch, wanted in ((_SHARING, shared, known.shares), (_PADDING, unshared, known.pads)):
                if not wanted:
                    continue
                try:
                    found = self._chosen([batch.to(known.device)])
                    errors = [((found[j] - row).abs() / (1 + row.abs())) for j, row in plain.items()]
                    # In half precision single tokens may be routed to another expert.
                    exact_in_full = known.dtype == torch.float32
                    error = max((e.max() if exact_in_full else e.mean()).item() for e in errors)
                    exact = error <= _TOLERANCE * (1 if exact_in_full else 30)
                    reason = f"log-probabilities differ by {error:.1e}"
                except _NOT_SUPPORTED as problem:
                    exact, reason = False, f"{type(problem).__name__}: {problem}"
                if not exact:
                    known.shares = known.shares and what != _SHARING
                    known.pads = known.pads and what != _PADDING
                    self._fall_back(what, f"at sequences of {length} tokens {reason}")

    def _chosen(self, batches: Iterable[MicroBatch]) -> dict[int, Tensor]:
        """Log-probabilities of the response tokens, by rollout number."""
        return {
            j: row_N[written_N]
            for batch in batches
            for j, row_N, written_N in zip(
                batch.rollout_B.tolist(), self._logprobs_together(batch, 1.0), batch.written_BN, strict=True
            )
        }

    @contextmanager
    def _as_checked(self) -> Iterator[None]:
        """Evaluation mode, gathered weights and no gradients, in the context."""
        with evaluating(self.model), torch.no_grad():
            try:
                gather(self.model)  # a shortcut bypasses the outermost module, which would gather its own weights
                yield
            finally:
                reshard(self.model)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """No shortcuts in the context: FSDP2 gathers weights and reduces gradients in forwards of the whole model."""
        shortcuts = self._split, self.shares_prompts
        self._split = self.shares_prompts = False
        try:
            yield
        finally:
            self._split, self.shares_prompts = shortcuts

    @contextmanager
    def by_layer(self) -> Iterator[None]:
        """The shortcuts for a model that FSDP2 gathers layer by layer, in the context.

        A layer's weights are gathered for its backward when the gradient of its output arrives. So a prompt's pass runs
        to its end, and gets a gradient of zero there.
        """
        with layer_by_layer(self.model):
            self._by_layer = True
            try:
                yield
            finally:
                self._by_layer = False

    def logprobs(self, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
        """Log-probability of each token that the policy wrote, [B, N], zero elsewhere; without gradients. float32, or
        float64 for a float64 model."""
        if self._checked.pads or batch.prompts is not None:
            return self._logprobs_together(batch, temperature)
        found_BN = torch.zeros_like(batch.weights_BN, dtype=self._wide)
        for i, row in enumerate(alone(batch)):
            found_BN[i, : row.weights_BN.shape[1]] = self._logprobs_together(row, temperature)[0]
        return found_BN

    def _logprobs_together(self, batch: MicroBatch, temperature: float) -> Tensor:
        with torch.no_grad():
            found_BN = torch.zeros_like(batch.weights_BN, dtype=self._wide)
            hidden_BTH = self._hidden(batch, None)[0] if self._split else None
            for rows in self._chunks(batch):
                found_BN[rows] = self._logprobs(batch, rows, self._grid(batch, hidden_BTH, rows), temperature)
        return torch.where(batch.written_BN, found_BN, 0.0)

    @property
    def _wide(self) -> torch.dtype:
        """Type of log-probabilities."""
        return torch.promote_types(torch.float32, next(self.model.parameters()).dtype)

    def backward(
        self, batch: MicroBatch, objective: Objective, observation: Observation, on_weights: OnWeights | None = None
    ) -> None:
        """Back-propagate the weighted log-probabilities of the responses to the observed layers.

        If only the output layer is observed, the backward stops below it. on_weights is called for each chunk of
        sequences.
        """
        tell = on_weights or (lambda problem_B, before_BN, after_BN: None)
        whole = self._checked.pads or batch.prompts is not None
        for part in [batch] if whole else alone(batch):
            self._backward_together(part, objective, observation, tell)

    def _backward_together(
        self, batch: MicroBatch, objective: Objective, observation: Observation, tell: OnWeights
    ) -> None:
        if not self._split:
            observation.of(batch.problem_B)
            logits_BTV = self.model(input_ids=batch.token_ids_BT, use_cache=False).logits
            logprobs_BN = chosen_logprobs(at_responses(batch, logits_BTV), batch.targets_BN, objective.temperature)
            weights_BN = _weights(batch, slice(None), logprobs_BN, objective, tell)
            (logprobs_BN * weights_BN).sum().backward()
            return
        hidden_BTH, ends = self._hidden(batch, observation)
        grid_BNH = at_responses(batch, hidden_BTH)
        leaf_BNH = grid_BNH.detach().requires_grad_(grid_BNH.requires_grad)
        for rows in self._chunks(batch):
            observation.of(batch.problem_B[rows])
            logprobs_BN = self._logprobs(batch, rows, leaf_BNH[rows], objective.temperature)
            weights_BN = _weights(batch, rows, logprobs_BN, objective, tell)
            (logprobs_BN * weights_BN).sum().backward()
        if grid_BNH.requires_grad:
            ends = [end for end in ends if end.requires_grad]
            torch.autograd.backward([grid_BNH, *ends], [leaf_BNH.grad, *map(torch.zeros_like, ends)])

    def _hidden(self, batch: MicroBatch, observation: Observation | None) -> tuple[Tensor, list[Tensor]]:
        """Hidden states of the continuations, [B, T, H], and those of the prompts if they ran to their end."""
        cache = mask_BK = positions_BT = None
        ends: list[Tensor] = []
        if batch.prompts is not None:
            if observation:
                observation.of(batch.prompts.problem_Q)
            cache, mask_BK, positions_BT, ends = self._run_prompts(batch, batch.prompts)
        if observation:
            observation.of(batch.problem_B)
        with grouped_attention(self._backbone.config) if cache is not None else nullcontext():
            hidden_BTH = self._backbone(
                input_ids=batch.token_ids_BT,
                attention_mask=mask_BK,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=cache is not None,
            )[0]
        return hidden_BTH, ends

    def _run_prompts(self, batch: MicroBatch, prompts: Prompts) -> tuple[DynamicCache, Tensor, Tensor, list[Tensor]]:
        """The prompts' cache expanded to the continuations, with their attention mask and position ids; and the hidden
        states of prompts that ran to their end."""
        ends: list[Tensor] = []
        filled = DynamicCache() if self._by_layer else _PromptCache(self._backbone.config.num_hidden_layers)
        with suppress(_Filled):
            ends += self._backbone(input_ids=prompts.token_ids_QS, past_key_values=filled, use_cache=True)[:1]
        cache = DynamicCache()
        for number, layer in enumerate(cast(Any, filled).layers):
            keys, values = (states.index_select(0, prompts.prompt_B) for states in (layer.keys, layer.values))
            cache.update(keys, values, number)
        n_prompt, n_own = prompts.token_ids_QS.shape[1], batch.token_ids_BT.shape[1]
        device = batch.token_ids_BT.device
        length_B = prompts.length_Q[prompts.prompt_B]
        mask_BK = torch.ones(len(length_B), n_prompt + n_own, dtype=torch.long, device=device)
        mask_BK[:, :n_prompt] = torch.arange(n_prompt, device=device) < length_B[:, None]
        return cache, mask_BK, length_B[:, None] + torch.arange(n_own, device=device), ends

    def _chunks(self, batch: MicroBatch) -> list[slice]:
        """Slices of sequences whose logits are formed at once."""
        n_rows, n_tokens = batch.weights_BN.shape
        held = LOGIT_BYTES if batch.weights_BN.is_cuda else LOGIT_BYTES_ON_CPU
        size = max(1, held // (4 * n_tokens * self.n_vocabulary)) if self._split else n_rows
        return [slice(start, start + size) for start in range(0, n_rows, size)]

    def _grid(self, batch: MicroBatch, hidden_BTH: Tensor | None, rows: slice) -> Tensor | None:
        return None if hidden_BTH is None else at_responses(batch, hidden_BTH)[rows]

    def _logprobs(self, batch: MicroBatch, rows: slice, grid_BNH: Tensor | None, temperature: float) -> Tensor:
        if grid_BNH is None:
            logits_BTV = self.model(input_ids=batch.token_ids_BT, use_cache=False).logits
            return chosen_logprobs(at_responses(batch, logits_BTV), batch.targets_BN, temperature)
        return chosen_logprobs(self._head(grid_BNH), batch.targets_BN[rows], temperature)

    def _attends_fully(self, base: nn.Module) -> bool:
        """Whether every layer attends to all tokens: a sliding window over cache slots would count the padding."""
        kinds = set(getattr(cast(Any, base).config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            self._fall_back(_SHARING, f"it has {', '.join(sorted(kinds))} layers")
        return kinds == {"full_attention"}

    def _caps_nothing(self, config: Any) -> bool:
        """Whether logits are not capped: a cap changes small logits by less than a comparison can detect."""
        capped = bool(getattr(config, "final_logit_softcapping", None))
        if capped:
            self._fall_back(_HEAD, "its logits are capped")
        return not capped

    def _fall_back(self, what: str, reason: str) -> None:
        self.fallbacks.append(f"{what}: {reason}")
        log.warning("%s: not exact for %s (%s); the plain forward serves", what, type(self.model).__name__, reason)

    def _is_exact(self, what: str, shortcut: Callable[[Tensor], Tensor]) -> bool:
        """Whether a shortcut gives the plain forward's log-probabilities on a few fixed sequences."""
        device = next(self.model.parameters()).device
        token_ids_BT = (torch.arange(24, device=device).reshape(2, 12) * 7 + 3) % self.n_vocabulary
        try:
            with self._as_checked():
                plain = self.model(input_ids=token_ids_BT, use_cache=False).logits[:, 6:].float().log_softmax(-1)
                gather(self.model)
                found = shortcut(token_ids_BT).float().log_softmax(-1)
            error = ((found - plain).abs() / (1 + plain.abs())).max().item()
            reason = f"log-probabilities differ by {error:.1e}"
            exact = error <= _TOLERANCE * (1 if plain.dtype == torch.float32 and _is_fp32(self.model) else 30)
        except _NOT_SUPPORTED as problem:
            if is_out_of_memory(problem):  # says nothing about the shortcut
                raise
            exact, reason = False, f"{type(problem).__name__}: {problem}"
        if not exact:
            self._fall_back(what, reason)
        return exact

    def _hidden_then_head(self, token_ids_BT: Tensor) -> Tensor:
        return self._head(self._backbone(input_ids=token_ids_BT, use_cache=False)[0])[:, 6:]

    def _cached(self, token_ids_BT: Tensor) -> Tensor:
        """The last six logits of each sequence by cached prompts: padded, with two continuations per prompt."""
        device = token_ids_BT.device
        prompts = Prompts(
            torch.cat([token_ids_BT[:, :6], torch.zeros_like(token_ids_BT[:, :2])], 1),
            torch.tensor([6, 6], device=device),
            torch.arange(2, device=device),
            torch.tensor([0, 1, 1, 0], device=device),
        )
        twice = token_ids_BT[prompts.prompt_B][:, 6:]
        batch = MicroBatch(
            twice,
            prompts.prompt_B,
            prompts.prompt_B,
            prompts.prompt_B * 0,
            twice,
            twice.float(),
            twice > 0,
            None,
            prompts,
        )
        return self._head(self._hidden(batch, None)[0])[:2]


class _Filled(Exception):  # noqa: N818
    """Raised when a prompt's cache has the keys and values of every layer."""


class _PromptCache(DynamicCache):
    """Cache that ends its forward once the last layer's keys and values are stored: that layer's output at prompt
    tokens is not needed."""

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self._n_layers = n_layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any) -> Any:
        found = super().update(key_states, value_states, layer_idx, *rest, **named)
        if layer_idx == self._n_layers - 1:
            raise _Filled
        return found


def _weights(batch: MicroBatch, rows: slice, logprobs_BN: Tensor, objective: Objective, tell: OnWeights) -> Tensor:
    """Token weights with importance ratios and KL term, both computed from the current log-probabilities."""
    weights_BN, logprobs_BN = batch.weights_BN[rows], logprobs_BN.detach()
    weighted_BN = weights_BN
    if batch.behaviour_BN is not None:
        weighted_BN = importance_weights(
            logprobs_BN, batch.behaviour_BN[rows], weights_BN, batch.written_BN[rows], objective
        )
    tell(batch.problem_B[rows], weights_BN, weighted_BN)
    if objective.importance:
        weights_BN = weighted_BN
    if batch.kl_scales_BN is None or batch.reference_BN is None:
        return weights_BN
    return weights_BN + kl_weights(logprobs_BN, batch.reference_BN[rows], batch.kl_scales_BN[rows])


def _is_fp32(model: nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.float32
