"""Cron as KFP's controller reads it, and the way from a user's time zone to the controller's."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from graftwork.errors import UserError
from graftwork.pipelines import cron

NOW = datetime(2026, 11, 26, tzinfo=UTC)
WORLD = ZoneInfo("UTC")
# What robfig/cron answered: the next times after NOW. (Version 3.0.1 with six fields and, as in KFP's 1.2.0, a star that stays one with a step.)
ROBFIG = {
    "0 0 3 * * 0": "2026-11-29T03:00:00 2026-12-06T03:00:00 2026-12-13T03:00:00",
    "0 30 2 1 * ?": "2026-12-01T02:30:00 2027-01-01T02:30:00 2027-02-01T02:30:00",
    "0 0 9 ? * MON-FRI": "2026-11-26T09:00:00 2026-11-27T09:00:00 2026-11-30T09:00:00",
    "0 */15 * * * *": "2026-11-26T00:15:00 2026-11-26T00:30:00 2026-11-26T00:45:00",
    "30 0 3 1,15 * SUN": "2026-11-29T03:00:30 2026-12-01T03:00:30 2026-12-06T03:00:30",
    "0 0 3 13 * 5": "2026-11-27T03:00:00 2026-12-04T03:00:00 2026-12-11T03:00:00",
    "0 0 3 */2 * 1": "2026-12-07T03:00:00 2026-12-21T03:00:00 2027-01-11T03:00:00",
    "0 0 3 1 * */2": "2026-12-01T03:00:00 2027-04-01T03:00:00 2027-05-01T03:00:00",
    "0 0 3 1/10 * *": "2026-12-01T03:00:00 2026-12-11T03:00:00 2026-12-21T03:00:00",
    "0 0 3 * * 1/2": "2026-11-27T03:00:00 2026-11-30T03:00:00 2026-12-02T03:00:00",
    "0 0 3 * feb,Dec *": "2026-12-01T03:00:00 2026-12-02T03:00:00 2026-12-03T03:00:00",
    "0 5-10/2,50 22-23 * * *": "2026-11-26T22:05:00 2026-11-26T22:07:00 2026-11-26T22:09:00",
    "0 0 12 4-4/4 * *": "2026-12-04T12:00:00 2027-01-04T12:00:00 2027-02-04T12:00:00",
    "*/20 59 23 31 12 *": "2026-12-31T23:59:00 2026-12-31T23:59:20 2026-12-31T23:59:40",
    "0 0 0 31 * *": "2026-12-31T00:00:00 2027-01-31T00:00:00 2027-03-31T00:00:00",
    "@weekly": "2026-11-29T00:00:00 2026-12-06T00:00:00 2026-12-13T00:00:00",
    "@monthly": "2026-12-01T00:00:00 2027-01-01T00:00:00 2027-02-01T00:00:00",
    "@yearly": "2027-01-01T00:00:00 2028-01-01T00:00:00 2029-01-01T00:00:00",
    "@hourly": "2026-11-26T01:00:00 2026-11-26T02:00:00 2026-11-26T03:00:00",
}


@pytest.mark.parametrize("text", ROBFIG)
def test_it_is_read_as_kfp_reads_it(text: str) -> None:
    """The times that a user is shown would not be those at which her model is trained."""
    times = cron.next_times(cron.parse(text), WORLD, 3, NOW)
    assert " ".join(f"{time:%Y-%m-%dT%H:%M:%S}" for time in times) == ROBFIG[text]


@pytest.mark.parametrize("text", [*ROBFIG, "0 3 * * 0", "*,5 * * * *"])
def test_what_is_sent_has_six_fields_and_stays_itself(text: str) -> None:
    """Of five fields KFP takes the first for the seconds, silently: every Sunday at three becomes something else."""
    sent = cron.parse(text)
    assert len(sent.split()) == 6
    assert cron.parse(sent) == sent


def test_the_five_fields_of_a_crontab_begin_with_the_minutes() -> None:
    """A user's crontab line would fire every minute of an hour, or never."""
    assert cron.parse("0 3 * * 0") == "0 0 3 * * 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0 30 2 *", "never fires"),
        ("0 0 0 31 4,6,9,11 *", "never fires"),
        ("0 3 * * 7", "Sunday is 0"),
        ("60 3 * * *", "'60' is no minute; give 0 to 59"),
        ("0 24 * * *", "'24' is no hour"),
        ("0 3 0 * *", "'0' is no day of the month; give 1 to 31"),
        ("0 3 * 13 *", "'13' is no month; give 1 to 12 or JAN to DEC"),
        ("0 3 5-1 * *", "goes from 5 back to 1"),
        ("0 3 */0 * *", "step of 0"),
        ("0 3 L * *", "'L' is no day of the month"),
        ("0 3 * * 5#2", "'5#2' is no weekday"),
        ("0 3 * * MONDAY", "'MONDAY' is no weekday"),
        ("0 3 1,,2 * *", "'' is no day of the month"),
        ("0 3 * *", "has 4 fields"),
        ("0 0 3 * * 0 2027", "has 7 fields"),
        ("", "has 0 fields"),
        ("every sunday", "has 2 fields"),
        ("@weekley", "did you mean @weekly"),
        ("@every 1h30m", "no fixed times"),
        ("CRON_TZ=Europe/Berlin 0 3 * * 0", "give --timezone"),
        ("TZ=UTC 0 3 * * 0", "give --timezone"),
        ("٣ ٣ * * *", "is no minute"),
    ],
)
def test_a_mistake_says_what_to_write(text: str, message: str) -> None:
    """A schedule that never fires, or fires at another time, is found out weeks later."""
    with pytest.raises(UserError, match="; ") as refused:
        cron.parse(text)
    assert message in str(refused.value)


def test_a_leap_day_is_no_mistake() -> None:
    """A cron that fires once in four years would be called one that never does."""
    (first,) = cron.next_times(cron.parse("0 0 29 2 *"), WORLD, 1, NOW)
    assert (first.year, first.month, first.day) == (2028, 2, 29)


def test_it_is_told_in_words() -> None:
    """A user could not see that what she wrote is not what she meant."""
    assert cron.in_words(cron.parse("0 3 * * 0")) == "At 03:00 on Sunday"
    assert cron.in_words(cron.parse("@monthly")) == "At 00:00 on the first day of every month"


# ---- time zones ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "zone", "kfp", "sent"),
    [
        ("0 3 * * 0", "UTC", "UTC", "0 0 3 * * 0"),
        ("30 20 * * *", "Asia/Tokyo", "UTC", "0 30 11 * * *"),
        ("0 3 * * 0", "Asia/Tokyo", "UTC", "0 0 18 * * 6"),  # still Saturday in Greenwich
        ("0 3 * * mon-fri", "Asia/Tokyo", "UTC", "0 0 18 * * 0,1,2,3,4"),
        ("0 22 * * 6", "America/Bogota", "UTC", "0 0 3 * * 0"),
        ("45 9 1 * *", "Asia/Kolkata", "UTC", "0 15 4 1 * *"),
        ("0 3,21 * * *", "Asia/Tokyo", "UTC", "0 0 12,18 * * *"),
        ("15 * * * *", "Europe/Berlin", "UTC", "0 15 * * * *"),  # the same every hour, summer or not
        ("15 * * * *", "Asia/Kolkata", "UTC", "0 45 * * * *"),
        ("0 3 * * 0", "Europe/Berlin", "Europe/Paris", "0 0 3 * * 0"),
        ("0 9 * * *", "UTC", "Asia/Tokyo", "0 0 18 * * *"),
    ],
)
def test_a_time_zone_is_carried_over_where_that_can_be(text: str, zone: str, kfp: str, sent: str) -> None:
    """Her model would be trained at three o'clock of another continent."""
    expression, here, there = cron.parse(text), ZoneInfo(zone), ZoneInfo(kfp)
    moved = cron.in_zone_of_kfp(expression, here, there, NOW)
    assert moved == sent
    wanted = [time.astimezone(UTC) for time in cron.next_times(expression, here, 200, NOW)]
    assert [time.astimezone(UTC) for time in cron.next_times(moved, there, 200, NOW)] == wanted
    assert wanted[-1] > NOW + timedelta(days=8)


@pytest.mark.parametrize(
    ("text", "zone", "message"),
    [
        ("0 3 * * 0", "Europe/Berlin", "1:00 h apart in one half of the year and 2:00 h in the other"),
        ("0 3 * * 0", "America/New_York", "-5:00 h apart in one half of the year and -4:00 h"),
        ("0 3 1 * *", "Asia/Tokyo", "another day"),
        ("0 3,21 * * 1", "Asia/Tokyo", "another day"),
        ("0,45 9 * * *", "Asia/Kolkata", "cannot be moved by 5:30 h together"),
    ],
)
def test_a_time_zone_that_cannot_be_carried_over_is_refused(text: str, zone: str, message: str) -> None:
    """From the last Sunday of March on, the run that must be over by nine would begin an hour late, and nobody would know."""
    with pytest.raises(UserError, match="--cluster-timezone") as refused:
        cron.in_zone_of_kfp(cron.parse(text), ZoneInfo(zone), WORLD, NOW)
    assert message in str(refused.value) and zone in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"), [("Europe/Berln", "did you mean Europe/Berlin"), ("../etc", "UTC"), ("", "UTC")]
)
def test_a_time_zone_that_there_is_not(name: str, message: str) -> None:
    """A typing mistake would end in a trace of zoneinfo's."""
    with pytest.raises(UserError, match=message):
        cron.find_zone(name)
