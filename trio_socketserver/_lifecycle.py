"""The life of a serving loop, as a table.

A server's loop is fresh, running, stopping or stopped. `TRANSITIONS` says what may happen
in each state; what it does not list is an error. Nothing polls the state: stopping a
running loop cancels the loop's scope.
"""

from __future__ import annotations

import enum

import trio


class LoopState(enum.Enum):
    """Where a serving loop is."""

    FRESH = "no loop has run since the server was entered"
    STOP_REMEMBERED = "stopped before it began: the first loop will return at once"
    RUNNING = "accepting"
    STOPPING = "cancelled, unwinding"
    STOPPED = "a loop has run; the next may begin"


class LoopEvent(enum.Enum):
    """What can happen to a serving loop."""

    ENTER = "entering 'async with server'"
    BEGIN = "serve_forever() or handle_request()"
    STOP = "shutdown()"
    END = "the loop has returned"
    LEAVE = "leaving 'async with server'"


TRANSITIONS: dict[tuple[LoopState, LoopEvent], LoopState] = {
    (LoopState.FRESH, LoopEvent.ENTER): LoopState.FRESH,
    (LoopState.FRESH, LoopEvent.BEGIN): LoopState.RUNNING,
    (LoopState.FRESH, LoopEvent.STOP): LoopState.STOP_REMEMBERED,
    (LoopState.FRESH, LoopEvent.LEAVE): LoopState.FRESH,
    (LoopState.STOP_REMEMBERED, LoopEvent.ENTER): LoopState.STOP_REMEMBERED,
    (LoopState.STOP_REMEMBERED, LoopEvent.BEGIN): LoopState.STOPPING,
    (LoopState.STOP_REMEMBERED, LoopEvent.STOP): LoopState.STOP_REMEMBERED,
    (LoopState.STOP_REMEMBERED, LoopEvent.LEAVE): LoopState.FRESH,
    (LoopState.RUNNING, LoopEvent.STOP): LoopState.STOPPING,
    (LoopState.RUNNING, LoopEvent.END): LoopState.STOPPED,
    (LoopState.STOPPING, LoopEvent.STOP): LoopState.STOPPING,
    (LoopState.STOPPING, LoopEvent.END): LoopState.STOPPED,
    # Only if a hook holds the loop up for longer than closing waits.
    (LoopState.STOPPING, LoopEvent.LEAVE): LoopState.STOPPING,
    (LoopState.STOPPED, LoopEvent.ENTER): LoopState.FRESH,
    (LoopState.STOPPED, LoopEvent.BEGIN): LoopState.RUNNING,
    (LoopState.STOPPED, LoopEvent.STOP): LoopState.STOPPED,
    (LoopState.STOPPED, LoopEvent.LEAVE): LoopState.STOPPED,
}


class ServingLoop:
    """One server's loop, through any number of runs.

    Attributes:
        state: where it is.
    """

    __slots__ = ("_ended", "_scope", "_task", "state")

    def __init__(self) -> None:
        self.state = LoopState.FRESH
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._task: trio.lowlevel.Task | None = None

    def _move(self, event: LoopEvent) -> None:
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise RuntimeError(
                f"{event.value} is not possible now; the server's loop is in state "
                f"{self.state.name} ({self.state.value})"
            ) from None

    @property
    def active(self) -> bool:
        """Whether a loop is running or stopping."""
        return self.state in (LoopState.RUNNING, LoopState.STOPPING)

    @property
    def fresh(self) -> bool:
        """Whether no loop has run yet since the server was entered."""
        return self.state in (LoopState.FRESH, LoopState.STOP_REMEMBERED)

    def enter(self) -> None:
        """Take note that the server is entered."""
        self._move(LoopEvent.ENTER)

    def leave(self) -> None:
        """Take note that the server has been left; a stop is no longer remembered."""
        self._move(LoopEvent.LEAVE)

    def begin(self) -> trio.CancelScope:
        """Make the calling task the loop's, until `end`.

        Returns:
            The scope that `stop` cancels; the caller puts its waiting inside. It is
            cancelled already if a stop has been remembered.

        Raises:
            RuntimeError: another loop is active.
        """
        self._move(LoopEvent.BEGIN)
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._task = trio.lowlevel.current_task()
        if self.state is LoopState.STOPPING:
            self._scope.cancel()
        return self._scope

    def end(self) -> None:
        """Take note that the loop has returned, and wake who waits for it; idempotent."""
        if self.active:
            self._task = None
            self._move(LoopEvent.END)
            self._ended.set()

    def is_current_task(self) -> bool:
        """Tell whether the caller is the loop's own task, as in a hook."""
        return self._task is trio.lowlevel.current_task()

    def stop(self) -> None:
        """Stop the loop that is active, or the first that will be."""
        self._move(LoopEvent.STOP)
        self._scope.cancel()

    async def wait_ended(self) -> None:
        """Wait until no loop is active.

        Returns to the loop's own task, which cannot wait for its own end; the checkpoint
        after this one is where it ends.
        """
        if self.is_current_task():
            await trio.lowlevel.cancel_shielded_checkpoint()
        elif self.active:
            await self._ended.wait()
        else:
            await trio.lowlevel.checkpoint()
