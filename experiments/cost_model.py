"""Speed-up from times: the formula, and the times of a GPU from its bandwidth and arithmetic. Nothing is measured here.

A cycle gives τ tokens and takes ``T_draft + T_verify(n)``; plain decoding takes ``T(1)`` a token::

    speed-up <= tau * T(1) / (T_draft + T_verify(n))

It is a bound, since a request also reads its prompt, and a cycle also selects, accepts and commits; `Request` adds
these.

On a GPU a forward of ``n`` rows takes what its slower half takes, reading or computing (roofline)::

    T(n) = max(bytes / bandwidth, flop(n) / arithmetic) + layers * overhead
    bytes   = 2 * (layers * layer_parameters + head_parameters) + 4 * layers * hidden * context
    flop(n) = 2 * n * (layers * layer_parameters + head_parameters) + 4 * n * layers * hidden * context

in 16 bit: two bytes a weight, and keys and values of ``context`` rows in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.random_pair import Shape

FORMULA = "speed-up <= tau * T(1) / (T_draft + T_verify(n))"
BYTES = 2


def bound(tau: float, one: float, draft: float, verify: float) -> float:
    """The formula. Seconds."""
    return tau * one / (draft + verify)


def break_even(one: float, draft: float, verify: float) -> float:
    """The acceptance length below which speculation loses."""
    return (draft + verify) / one


@dataclass(frozen=True)
class Times:
    """Seconds of one machine: ``one`` token plainly, ``draft`` and ``verify`` of a cycle, the rest of a cycle
    (``other``), and of a request its ``prompt``, and the draft's reading of it (``draft_prompt``)."""

    one: float
    draft: float
    verify: float
    other: float = 0.0
    prompt: float = 0.0
    draft_prompt: float = 0.0

    def bound(self, tau: float) -> float:
        """Of decoding alone."""
        return bound(tau, self.one, self.draft, self.verify)

    def request(self, tau: float, new_tokens: int) -> float:
        """Speed-up of a whole request; its first token comes from the prompt."""
        later = new_tokens - 1
        plain = self.prompt + later * self.one
        cycle = self.draft + self.verify + self.other
        return plain / (self.prompt + self.draft_prompt + later / tau * cycle)


@dataclass(frozen=True)
class Gpu:
    """``bandwidth`` bytes a second, ``arithmetic`` floating-point operations a second, both as really reached;
    ``layer_overhead`` seconds that the host needs to launch a layer, where it does not hide behind the device;
    ``cycle_overhead`` seconds of a cycle outside forwards."""

    bandwidth: float
    arithmetic: float
    layer_overhead: float = 0.0
    cycle_overhead: float = 0.0

    def seconds(self, parameters: float, hidden: int, layers: int, rows: int, context: int) -> float:
        """One forward of ``rows`` rows through ``layers`` layers that have ``parameters`` with the head."""
        read = BYTES * parameters + 2 * BYTES * layers * hidden * context
        computed = 2 * rows * parameters + 4 * rows * layers * hidden * context
        return max(read / self.bandwidth, computed / self.arithmetic) + layers * self.layer_overhead

    def forward(self, shape: Shape, rows: int, context: int) -> float:
        """The target's."""
        parameters = shape.layers * shape.layer_parameters + shape.head_parameters
        return self.seconds(parameters, shape.hidden, shape.layers, rows, context)

    def draft_step(self, shape: Shape, rows: int, context: int, head: bool = True) -> float:
        """One level of the draft: one layer, and the target's head unless only the prompt is read."""
        parameters = shape.draft_parameters + (shape.head_parameters if head else 0)
        return self.seconds(parameters, shape.hidden, 1, rows, context)

    def times(self, shape: Shape, tree: tuple[int, int, int], context: int) -> Times:
        """Of a tree of (depth, top-k, nodes) after ``context`` positions. A tree has ``depth`` levels after the first
        one, which comes from reading the accepted rows."""
        depth, top_k, nodes = tree
        return Times(
            one=self.forward(shape, 1, context),
            draft=self.draft_step(shape, depth, context) + depth * self.draft_step(shape, top_k, context),
            verify=self.forward(shape, nodes, context),
            other=self.cycle_overhead,
            prompt=self.forward(shape, context, 0),
            draft_prompt=self.draft_step(shape, context, 0, head=False),
        )


def to_depth(short: float, long: float, depths: tuple[int, int], wanted: int) -> float:
    """Time at ``wanted`` layers from the times at two ``depths``, by the straight line through them: what no layer
    takes, and what each takes."""
    a_layer = max(0.0, (long - short) / (depths[1] - depths[0]))
    return max(long, short) + a_layer * (wanted - depths[1])
