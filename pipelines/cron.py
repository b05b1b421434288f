"""Cron as KFP reads it: checked before anything is created, told in words, and carried from the user's time zone to KFP's.

KFP reads cron with robfig/cron 1, so this takes what that takes: six fields with the seconds first, names, ranges, lists, steps, ``?`` and
``@weekly``. Sunday is 0 there and never 7, and there is no ``L``, ``W`` or ``#``, nor a time zone in the text: all schedules are in the zone of
KFP's controller. A crontab's five fields, which it would read as seconds to months, get a ``0`` for the seconds.
"""

import difflib
import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from graftwork.errors import UserError, one_line

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
SHORT = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
HOW = "write MINUTE HOUR DAY MONTH WEEKDAY, as '0 3 * * 0', or six fields with the seconds first"
HORIZON = timedelta(days=5 * 365)  # robfig/cron looks no further, and then calls the year 1 the next time


class Field(NamedTuple):
    """One of the six: its name, its bounds, and the names of its values from the lowest on."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


FIELDS = (
    Field("second", 0, 59),
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of the month", 1, 31),
    Field("month", 1, 12, MONTHS),
    Field("weekday", 0, 6, DAYS),
)


def parse(text: str) -> str:
    """Return ``text`` as six fields that KFP and ``cronsim`` understand alike.

    Raises:
        UserError: it is no cron, or one that never fires.
    """
    shown, words = f"cron '{one_line(text)}'", SHORT.get(text.strip(), text).upper().split()
    if words and re.match(r"(CRON_)?TZ=", words[0]):
        raise UserError(f"{shown}: KFP reads no time zone there; leave it out, and give --timezone")
    if words and words[0].startswith("@"):
        near = difflib.get_close_matches(text.strip().lower(), SHORT, n=1)
        raise UserError(f"{shown}: has no fixed times; " + (f"did you mean {near[0]}?" if near else HOW))
    if len(words) not in (5, 6):
        raise UserError(f"{shown}: has {len(words)} fields, not 5 or 6; {HOW}")
    words = ["0"] * (6 - len(words)) + words
    expression = " ".join(canonical(word, field, shown) for word, field in zip(words, FIELDS, strict=True))
    if not next_times(expression, ZoneInfo("UTC"), 1):
        raise UserError(
            f"{shown}: never fires, as there is no such date (KFP looks five years ahead); change the day or the month"
        )
    return expression


def canonical(word: str, field: Field, shown: str) -> str:
    """Return a field with ``*`` for ``?`` and in the one order that both readers take for a star."""
    terms = sorted((one_term(part, field, shown) for part in word.split(",")), key=lambda term: term[0] != "*")
    return "*" if "*" in terms else ",".join(terms)


def one_term(term: str, field: Field, shown: str) -> str:
    low, high, step = span(term, field, shown)
    if term[0] in "*?":
        return "*" if step in (None, 1) else f"*/{step}"
    if low == high:  # where cronsim would read a step as one up to the highest value
        return str(low)
    if step is None:
        return f"{low}-{high}"
    return f"{low}-{high}/{step}"


def span(term: str, field: Field, shown: str) -> tuple[int, int, int | None]:
    """Return the first and the last value of ``1-5/2``, ``MON``, ``*/10``, ..., and its step."""
    read = re.fullmatch(r"([*?])(?:/(\d+))?|(\w+)(?:-(\w+))?(?:/(\d+))?", term, re.ASCII)
    if read is None:
        raise UserError(f"{shown}: '{one_line(term)}' is no {field.name}; {HOW}")
    star, star_step, first, last, range_step = read.groups()
    text_step = star_step or range_step
    step = None if text_step is None else int(text_step)
    low = field.low if star else number(first, field, shown)
    high = field.high if star or (last is None and step is not None) else number(last or first, field, shown)
    if low > high:
        raise UserError(f"{shown}: the {field.name} goes from {one_line(first)} back to {one_line(last)}; {HOW}")
    if step == 0:
        raise UserError(f"{shown}: '{one_line(term)}' has a step of 0; give 1 or more")
    return low, high, step


def number(text: str, field: Field, shown: str) -> int:
    if text in field.names:
        return field.low + field.names.index(text)
    if not text.isdigit() or not field.low <= int(text) <= field.high:
        sunday = " (Sunday is 0)" if field.names == DAYS and text == "7" else ""
        names = f" or {field.names[0]} to {field.names[-1]}" if field.names else ""
        raise UserError(
            f"{shown}: '{one_line(text)}' is no {field.name}; give {field.low} to {field.high}{names}{sunday}"
        )
    return int(text)


def next_times(expression: str, zone: ZoneInfo, count: int = 3, after: datetime | None = None) -> list[datetime]:
    """Return the next times, fewer than ``count`` where there are no more within five years."""
    from itertools import islice, takewhile

    from cronsim import CronSim, CronSimError

    start = (after or datetime.now(UTC)).astimezone(zone)
    try:
        times = CronSim(expression, start)
    except CronSimError:  # the fields are sound, so it is a date that there never is
        return []
    return list(islice(takewhile(lambda time: time < start + HORIZON, times), count))


def in_words(expression: str) -> str:
    from cronsim import CronSim

    return str(CronSim(expression, datetime.now(UTC)).explain())


def find_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        near = difflib.get_close_matches(name, available_timezones(), n=1)
        raise UserError(
            f"time zone '{one_line(name)}': there is none of this name; "
            + (f"did you mean {near[0]}?" if near else "give one as Europe/Berlin, or UTC")
        ) from None


# ---- from the user's time zone to KFP's ----------------------------------------------------------------------------------------


def in_zone_of_kfp(expression: str, zone: ZoneInfo, kfp: ZoneInfo, now: datetime | None = None) -> str:
    """Return the expression that means in KFP's time zone what ``expression`` means in the user's.

    Raises:
        UserError: no single expression does, as where one of the two puts its clock forward in summer.
    """
    start = now or datetime.now(UTC)
    offsets = {difference(start + timedelta(days=day), zone, kfp) for day in range(2 * 366)}
    second, minute, hour, day, month, weekday = expression.split()
    any_day = (day, month, weekday) == ("*", "*", "*")
    if any_day and hour == "*" and not any(offset % 60 for offset in offsets):
        return expression  # the same in every zone
    instead = (
        f"give it in {kfp.key} and leave out --timezone, or let KFP's controller run in {zone.key} (CRON_SCHEDULE_TIMEZONE of "
        f"deployment/ml-pipeline-scheduledworkflow) and say --cluster-timezone {zone.key}"
    )
    refused = f"--timezone {zone.key}: KFP keeps its schedules in {kfp.key}, and"
    if len(offsets) > 1:
        raise UserError(
            f"{refused} the two are {hours(min(offsets))} apart in one half of the year and {hours(max(offsets))} in the other; {instead}"
        )
    moved = [moved_by(m, h, -min(offsets)) for h in values(hour, FIELDS[2]) for m in values(minute, FIELDS[1])]
    days, minutes, all_hours = ({time[n] for time in moved} for n in range(3))
    if len(minutes) * len(all_hours) != len({time[1:] for time in moved}):
        raise UserError(f"{refused} its hours and minutes cannot be moved by {hours(min(offsets))} together; {instead}")
    if not any_day and (len(days) > 1 or (days != {0} and (day, month) != ("*", "*"))):
        raise UserError(f"{refused} there it is another day; {instead}")
    shift = 0 if any_day else days.pop()
    if shift:
        weekday = listed({(value + shift) % 7 for value in values(weekday, FIELDS[5])}, FIELDS[5])
    return " ".join([second, listed(minutes, FIELDS[1]), listed(all_hours, FIELDS[2]), day, month, weekday])


def difference(moment: datetime, zone: ZoneInfo, other: ZoneInfo) -> int:
    """Return by how many minutes the clocks of ``zone`` are ahead of those of ``other``."""
    offset, base = moment.astimezone(zone).utcoffset(), moment.astimezone(other).utcoffset()
    assert offset is not None and base is not None
    return round((offset - base).total_seconds() / 60)


def moved_by(minute: int, hour: int, offset: int) -> tuple[int, int, int]:
    """Return by how many days a time of day falls on another one, and its minute and hour there."""
    days, rest = divmod(60 * hour + minute + offset, 24 * 60)
    return days, rest % 60, rest // 60


def values(word: str, field: Field) -> set[int]:
    spans = (span(term, field, "cron") for term in word.split(","))
    return {value for low, high, step in spans for value in range(low, high + 1, step or 1)}


def listed(numbers: set[int], field: Field) -> str:
    return "*" if len(numbers) == field.high - field.low + 1 else ",".join(map(str, sorted(numbers)))


def hours(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 0 else "-" + hours(-minutes)
