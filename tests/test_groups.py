"""A nursery of ours raises a lone exception bare, and the body's as the object it was."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT
from trio.testing import wait_all_tasks_blocked

from trio_socketserver._groups import only_cancelled, open_ungrouped_nursery, ungrouped

Task = Callable[[], Awaitable[None]]


async def in_nursery(body: Task, *tasks: Task) -> None:
    """Run *body* in a nursery of ours, beside *tasks*."""
    async with open_ungrouped_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        await body()


def crash(error: BaseException) -> Task:
    """Return a task that fails with *error*."""

    async def task() -> None:
        raise error

    return task


def crash_when_cancelled(error: BaseException) -> Task:
    """Return a task that answers its cancellation with *error*."""

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise error

    return task


def crash_after_the_body(error: BaseException) -> Task:
    """Return a task that fails with *error* when nothing else happens any more."""

    async def task() -> None:
        await wait_all_tasks_blocked()
        raise error

    return task


async def cancelled() -> BaseException:
    """Return what a cancellation raises."""
    caught: list[BaseException] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as error:
            caught.append(error)
            raise
    return caught[0]


async def test_what_is_nothing_but_cancellation() -> None:
    cancellation = await cancelled()
    assert only_cancelled(cancellation)
    assert only_cancelled(BaseExceptionGroup("", [cancellation]))
    nested = BaseExceptionGroup("", [cancellation, BaseExceptionGroup("", [cancellation])])
    assert only_cancelled(nested)
    assert not only_cancelled(ValueError())
    assert not only_cancelled(BaseExceptionGroup("", [cancellation, ValueError()]))
    assert not only_cancelled(KeyboardInterrupt())


async def test_groups_of_one_are_taken_off() -> None:
    cancellation = await cancelled()
    error = ValueError("alone")
    assert ungrouped(error) is error
    group: BaseException = error
    for _ in range(3):
        group = BaseExceptionGroup("", [group])
        assert ungrouped(group) is error
    assert ungrouped(BaseExceptionGroup("", [cancellation, group])) is error

    several = ExceptionGroup("", [ValueError(), KeyError()])
    assert ungrouped(several) is several
    assert ungrouped(ExceptionGroup("", [several])) is several
    nothing_else = BaseExceptionGroup("", [cancellation, cancellation])
    assert only_cancelled(ungrouped(nothing_else))


# -- the nursery ------------------------------------------------------------------------


async def test_without_an_error_it_is_a_nursery() -> None:
    done = []

    async def work() -> None:
        await trio.lowlevel.checkpoint()
        done.append(True)

    await in_nursery(work, work, work)
    assert done == [True, True, True]


def body_errors() -> list[BaseException]:
    """Return what a body may raise, fresh each time."""
    return [
        ValueError("plain"),
        ExceptionGroup("the user's own", [ValueError()]),
        BaseExceptionGroup("a pair", [KeyboardInterrupt(), ValueError()]),
        KeyboardInterrupt(),
        SystemExit(3),
        StopAsyncIteration(),
        RuntimeError("the name that contextlib looks for"),
    ]


@pytest.mark.parametrize("number", range(len(body_errors())))
async def test_the_bodys_error_leaves_as_the_object_it_was(number: int) -> None:
    error = body_errors()[number]
    with pytest.raises(type(error)) as caught:
        await in_nursery(crash(error), trio.sleep_forever)
    assert caught.value is error
    assert error.__context__ is None
    assert error.__cause__ is None
    assert "raise error" in "".join(traceback.format_tb(error.__traceback__))


async def fail_with_history() -> None:
    try:
        raise KeyError("first")
    except KeyError as first:
        raise ValueError("second") from first


async def test_the_bodys_error_keeps_its_history() -> None:
    with pytest.raises(ValueError, match="second") as caught:
        await in_nursery(fail_with_history)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__context__ is caught.value.__cause__
    assert caught.value.__context__.__context__ is None


@pytest.mark.parametrize("error", [ValueError("alone"), KeyboardInterrupt()], ids=repr)
async def test_a_tasks_error_is_raised_bare(error: BaseException) -> None:
    cancelled = []

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.append(True)
            raise

    with trio.fail_after(REAL_LIMIT), pytest.raises(type(error)) as caught:
        await in_nursery(wait, crash(error), wait)
    assert caught.value is error
    assert cancelled == [True, True]
    assert error.__context__ is None


async def test_a_tasks_error_after_the_body_is_raised_bare() -> None:
    error = ValueError("late")
    with pytest.raises(ValueError, match="late") as caught:
        await in_nursery(trio.lowlevel.checkpoint, crash_after_the_body(error))
    assert caught.value is error


async def test_a_tasks_error_keeps_its_history() -> None:
    async def while_handling_another() -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            await in_nursery(trio.sleep_forever, fail_with_history)

    with pytest.raises(ValueError, match="second") as caught:
        await while_handling_another()
    assert isinstance(caught.value.__context__, KeyError)
    # What its user was handling has nothing to do with the task.
    assert caught.value.__context__.__context__ is None


async def test_several_errors_are_a_group() -> None:
    ours, theirs = ValueError("body"), KeyError("task")

    async def body() -> None:
        await wait_all_tasks_blocked()
        raise ours

    with trio.fail_after(REAL_LIMIT), pytest.raises(ExceptionGroup) as caught:
        await in_nursery(body, crash_when_cancelled(theirs))
    assert set(caught.value.exceptions) == {ours, theirs}


async def test_nested_nurseries_give_one_bare_error() -> None:
    error = ValueError("deep")

    async def users_own_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await in_nursery(trio.sleep_forever, crash(error))

    with trio.fail_after(REAL_LIMIT), pytest.raises(ExceptionGroup) as caught:
        await in_nursery(users_own_nursery)
    # The user's own nursery has made this group, and the user expects it.
    assert caught.value.exceptions == (error,)
    with pytest.raises(ValueError, match="deep"):
        await in_nursery(trio.sleep_forever, users_own_nursery)


async def test_a_cancellation_stays_one(autojump_clock: Any) -> None:
    with trio.move_on_after(1) as scope:
        await in_nursery(trio.sleep_forever, trio.sleep_forever)
    assert scope.cancelled_caught
    assert trio.current_time() == 1


async def test_an_error_beside_a_cancellation_is_raised_bare(autojump_clock: Any) -> None:
    error = ValueError("while cancelled")
    with (
        pytest.raises(ValueError, match="while cancelled") as caught,
        trio.move_on_after(1),
    ):
        await in_nursery(
            trio.sleep_forever, crash_when_cancelled(error), trio.sleep_forever
        )
    assert caught.value is error


def test_cancelling_the_nurserys_own_scope_ends_it() -> None:
    reached = []

    async def cancel(scope: trio.CancelScope) -> None:
        await wait_all_tasks_blocked()
        scope.cancel()

    async def main() -> None:
        with trio.fail_after(REAL_LIMIT):
            async with open_ungrouped_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(cancel, nursery.cancel_scope)
                await trio.sleep_forever()
        reached.append("behind the block")

    # A run of our own: a stray cancellation would end a test without a word.
    trio.run(main)
    assert reached


def leaves(error: BaseException) -> set[type[BaseException]]:
    """Return the types of what a group holds, however deep."""
    if isinstance(error, BaseExceptionGroup):
        return set().union(*map(leaves, error.exceptions))
    return {type(error)}


async def test_no_cancellation_of_the_nurserys_own_leaks_out() -> None:
    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash_when_cancelled(ValueError()))
            await trio.sleep_forever()

    async def fail() -> None:
        await wait_all_tasks_blocked()
        raise KeyError

    with trio.fail_after(REAL_LIMIT), pytest.raises(ExceptionGroup) as caught:
        await in_nursery(body, fail)
    assert leaves(caught.value) == {ValueError, KeyError}


async def idle_nursery() -> None:
    """Be a body with a nursery of its own, in which nothing goes wrong."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        await trio.sleep_forever()


@pytest.mark.parametrize("error", [ValueError("alone"), KeyboardInterrupt()], ids=repr)
async def test_a_tasks_error_is_raised_bare_whatever_the_body_does(
    error: BaseException,
) -> None:
    with trio.fail_after(REAL_LIMIT), pytest.raises(type(error)) as caught:
        await in_nursery(idle_nursery, crash(error), idle_nursery)
    assert caught.value is error


async def test_the_bodys_group_beside_a_cancellation_stays_a_group() -> None:
    error = ValueError("the user's")

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(crash_when_cancelled(error))
            await wait_all_tasks_blocked()
            scope.cancel()

    scope = trio.CancelScope()
    with trio.fail_after(REAL_LIMIT), pytest.raises(ExceptionGroup) as caught, scope:
        await in_nursery(body)
    # It is the group that the user's own nursery makes.
    assert caught.value.exceptions == (error,)


async def test_a_cancellation_from_outside_reaches_its_scope_through_a_group() -> None:
    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash_when_cancelled(ValueError()))
            nursery.start_soon(trio.sleep_forever)
            await wait_all_tasks_blocked()
            scope.cancel()

    scope = trio.CancelScope()
    with trio.fail_after(REAL_LIMIT), pytest.raises(ExceptionGroup) as caught, scope:
        await in_nursery(body)
    assert leaves(caught.value) == {ValueError}
