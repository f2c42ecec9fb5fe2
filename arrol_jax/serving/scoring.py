"""One pass over a prompt and an answer that are known: what decoding did not keep.

- The head's score of a trace that a stop string cut: the engine's is of where the segment ended, tokens after the cut included.
  Here it is that of the last kept token, from the same features, computed anew (in bfloat16 equal up to rounding).
- Log-probs of a prompt's tokens, and the likeliest alternatives at each place (echo, top_logprobs).

A pass costs a prefill of prompt and answer, and only calls that ask for one of these pay. Left out: several rows at once.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import programs
from arrol_jax.engine.programs import Slots
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.engine.token_counts import BUCKETS, count_tokens
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.layers import split_qkv
from arrol_jax.pruning import decision
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.serving.calls import Likelihoods

MOST_ALTERNATIVES = 20
_BLOCK = 64  # places whose logits are there at once


class Scorer:
  """Passes over an engine's model; head and rule are those of its decisions. Threads may share it; it changes nothing."""

  def __init__(self, engine: Engine, sampling: Sampling, head: dict | None, rule: PruneRule | None):
    self.engine, self.sampling, self.head, self.rule = engine, sampling, head, rule
    room = engine.max_prompt + engine.max_new
    self.lengths = sorted({-(-room * (i + 1) // 4 // _BLOCK) * _BLOCK for i in range(4)})

  def _padded(self, tokens: np.ndarray) -> np.ndarray:
    length = next(n for n in self.lengths if n >= len(tokens))
    return np.pad(tokens.astype(np.int32), (0, length - len(tokens)))[None]

  def likelihoods(self, prompt: np.ndarray, answer: list[int], temperature: float) -> Likelihoods:
    """Of all tokens of prompt and answer. temperature: the answer's, 0 counting as 1; the prompt's is 1."""
    tokens = np.concatenate([prompt, np.asarray(answer, np.int32)])
    padded = self._padded(tokens)
    heat = np.where(np.arange(padded.shape[1]) + 1 < len(prompt), 1.0, temperature or 1.0).astype(np.float32)
    with jax.set_mesh(self.engine.mesh):
      out = _likelihoods(self.engine.config, self.engine.params, padded, heat, sampling=self.sampling)
    logprobs, likeliest, ids = (x[:len(tokens) - 1] for x in jax.device_get(out))
    first = lambda x: np.concatenate([np.full_like(x[:1], -1 if x.dtype == np.int32 else np.nan, shape=(1, *x.shape[1:])), x])
    return Likelihoods(first(logprobs), first(ids), first(likeliest))

  def final(self, prompt: np.ndarray, answer: list[int], logprobs: list[float], siblings: Sequence[list[int]] = ()) -> float:
    """The head's logit at the last token of an answer; siblings: the other answers' tokens, for a head that compares them."""
    e, sampling = self.engine, self.sampling
    fed = np.concatenate([prompt, np.asarray(answer[:-1], np.int32)])  # a token's state is that of the step that drew it
    with jax.set_mesh(e.mesh):
      states = _states(e.config, e.params, self._padded(fed), len(prompt), len(fed), sampling=sampling)
      slots = _slots(self, states, answer, logprobs, siblings if sampling.taps.counts else ())
      rows = slots.generated.shape[0]
      out = decision.judge(slots, self.head, self.rule, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))[2]
    return float(out[0])


def _forward(c, params: dict, tokens: jax.Array, tap=None) -> jax.Array:
  """States after the final norm [1,S,D]."""
  attention = causal_attention("auto")

  def attend(_, qkv, rotary):
    q, k, v = split_qkv(qkv)
    q, k = rotary(q, k)
    return attention(q, k, v)[0], None

  positions = transformer.default_positions(tokens)
  return transformer.unrolled(c, params, tokens, positions, attend, tap=tap)[0]


@functools.partial(jax.jit, static_argnames=("c", "sampling"))
def _likelihoods(c, params: dict, tokens: jax.Array, temperature: jax.Array, *, sampling: Sampling) -> tuple:
  """tokens i32[1,S], temperature f32[S] -> at each place: the next token's log-prob f32[S], the likeliest f32[S,K], i32[S,K]."""
  hidden = _forward(c, params, tokens)[0]
  following = jnp.roll(tokens[0], -1)
  blocks = lambda x: x.reshape(-1, _BLOCK, *x.shape[1:])

  def block(x):
    states, token, heat = x
    logprobs = jax.nn.log_softmax(transformer.unembed(params, states) / heat[:, None], axis=1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    return chosen, *jax.lax.top_k(logprobs, min(MOST_ALTERNATIVES, logprobs.shape[1]))

  out = jax.lax.map(block, (blocks(hidden), blocks(following), blocks(temperature)))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


@functools.partial(jax.jit, static_argnames=("c", "sampling"))
def _states(c, params: dict, tokens: jax.Array, prompt: jax.Array, fed: jax.Array, *, sampling: Sampling) -> tuple:
  """What Slots keep of tokens i32[1,S], of which the first `fed` count and the first `prompt` are the prompt: the last state
  after the final norm, the sum of these since the prompt's last token, the taps, and the prompt's state, [1,D] each."""
  layers = {}
  hidden = _forward(c, params, tokens, tap=lambda layer, x: layers.update({layer: x}))
  place = jnp.arange(tokens.shape[1])
  drew = (place >= prompt - 1) & (place < fed)  # places whose step drew a token of the answer
  at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
  total = lambda x: jnp.sum(jnp.where(drew[None, :, None], x.astype(jnp.float32), 0.0), axis=1)
  taps = tuple(total(layers[layer]) if kind == "mean" else at(layers[layer], fed - 1) for kind, layer in sampling.taps.states)
  prompt_state = at(layers[sampling.taps.prompt], prompt - 1) if sampling.taps.prompt else hidden[:, 0, :0]
  return at(hidden, fed - 1), total(hidden), taps, prompt_state


def _slots(s: Scorer, states: tuple, answer: list[int], logprobs: list[float], siblings: Sequence[list[int]]) -> Slots:
  """An answer as the engine's slot would stand after its last token; siblings behind it, of which only the tokens are known."""
  sampling, rows = s.sampling, 1 + len(siblings)
  hidden, hidden_sum, taps, prompt_state = states
  wide = lambda x: jnp.pad(x, ((0, rows - 1), (0, 0)))
  one = lambda x: jnp.full((rows,), x, jnp.float32)
  recent = jnp.zeros((1, 3), jnp.float32)
  blank = jax.eval_shape(lambda: programs.init_slots(s.engine.config, rows, 16, dataclasses.replace(sampling, temperature=1.0)))
  for i, p in enumerate(logprobs):
    recent = _recent(recent, jnp.int32(i), jnp.float32(p))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank.replace(cache=(), key=None))
  return zeros.replace(
    cache=(None,) * s.engine.config.layers, generated=jnp.array([len(t) for t in (answer, *siblings)], jnp.int32),
    hidden=wide(hidden), hidden_sum=wide(hidden_sum) if sampling.pool else zeros.hidden_sum,
    logprob_sum=one(sum(logprobs)), logprob_min=one(min([0.0, *logprobs])), recent=wide(recent), taps=tuple(map(wide, taps)),
    prompt=wide(prompt_state) if sampling.taps.prompt else zeros.prompt,
    counts=_counts([answer, *siblings]) if sampling.taps.counts else zeros.counts)


@jax.jit
def _recent(recent: jax.Array, generated: jax.Array, logprob: jax.Array) -> jax.Array:
  one = SlotsSoFar(recent, generated[None])
  return programs._recent(one, logprob[None])


class SlotsSoFar(NamedTuple):
  """What programs._recent reads of Slots."""
  recent: jax.Array
  generated: jax.Array


def _counts(answers: list[list[int]]) -> jax.Array:
  """Hashed token counts f32[B,H] of so many answers."""
  longest = max(map(len, answers))
  tokens = jnp.array([a + [0] * (longest - len(a)) for a in answers], jnp.int32)
  there = jnp.array([[i < len(a) for i in range(longest)] for a in answers])
  counts = jnp.zeros((len(answers), BUCKETS), jnp.float32)
  return jax.lax.fori_loop(0, longest, lambda i, x: count_tokens(x, tokens[:, i], there[:, i]), counts)

