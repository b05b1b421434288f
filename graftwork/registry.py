"""MLflow's registry: one version a model, the aliases champion, challenger and previous, and decisions that are made one after the other.

MLflow's aliases have no compare-and-swap: the last writer wins, and of two runs that beat the same champion at once the worse may stay. So
decisions take turns. The ticket is the number of the version, which the registry gives to nobody twice: a version waits until every version
with a lower ticket that is waiting too has been decided. Each tells with a heartbeat that it lives. One whose heartbeat stands still for a
lease, as seen by the one that waits (no clocks are compared), is marked as abandoned and passed over.

An abandoned version that comes back takes a new ticket behind all that wait: it writes the ticket, then looks again whether somebody stands
behind it, and if so takes another. Of two that write and then look, at least one sees the other (the flag principle of Dekker and Lamport):
a version that comes after the look sees the ticket and waits for it. A process that is stopped for longer than the lease between its last
look and the alias, which are two requests, may still write over a decision made meanwhile: without compare-and-swap nothing can prevent that.

What a promotion does survives a kill between any two requests: the decision is written before the aliases move, and GATE, which tells
that it is finished, after them. A retry finds a version that still waits, and goes through all of it again.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from graftwork.errors import UserError, one_line
from graftwork.tracking import shown_uri, why_not

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
WAITING, PROMOTED, REFUSED = "waiting", "promoted", "refused"
# Tags of versions. GATE is absent from versions that were registered by hand, and those nobody waits for.
SAME_WEIGHTS = "graftwork.model_sha256"
GATE = "graftwork.gate"
DECISION = "graftwork.decision"
ROLLED_BACK = "graftwork.rolled_back"
TICKET, ABANDONED = "graftwork.ticket", "graftwork.abandoned"  # the second: the ticket that is no longer waited for
OWNER, HEARTBEAT = "graftwork.owner", "graftwork.heartbeat"  # the process that decides on a version, and its pulse
MADE_BY = "graftwork.made_by"
ROLLBACK = "graftwork.rollback"  # of the registered model: a rollback that is being made, as "FROM TO"
LEASE = 30.0  # seconds
LONGEST_DECISION = 5000  # characters: what MLflow's databases are sure to take


class DisplacedError(Exception):
    """This version is not for this process to decide any more: it was given up for dead, or another process took it over."""


class Place(NamedTuple):
    """A place in the queue, in order: the ticket, how often one was taken behind it, and the version."""

    ticket: int
    again: int
    version: int


# ---- one version a model ---------------------------------------------------------------------------------------------------------


def registry_name(name: str) -> str:
    """Return ``name`` as the registry takes it: no slash, colon or control character."""
    return "".join(c if c.isprintable() and c not in "/:" else "-" for c in name).strip()[:200] or "model"


def one_version(
    client: MlflowClient, name: str, sha256: str, run_id: str, create: Callable[[dict[str, str]], Any]
) -> str:
    """Return the number of the version with these weights; where there is none, ``create(tags)`` makes it.

    MLflow's client sends a request again whose answer was lost, and two runs may make the same model: the lowest number stays.
    """
    maker = uuid.uuid4().hex[:12]
    if not find_versions(client, name, sha256):
        create({SAME_WEIGHTS: sha256, GATE: WAITING, MADE_BY: maker})
    first, *copies = find_versions(client, name, sha256)
    for copy in copies:
        mine = copy.tags.get(MADE_BY) == maker or (run_id and copy.run_id == run_id)
        if mine and copy.tags.get(GATE) == WAITING:
            client.delete_model_version(name, str(copy.version))
    return str(first.version)


def find_versions(client: MlflowClient, name: str, sha256: str) -> list[Any]:
    """Return the versions with these very weights, the lowest number first."""
    found = search(client, name, f"tags.`{SAME_WEIGHTS}` = '{sha256}'")
    return sorted(found, key=lambda version: int(version.version))


def search(client: MlflowClient, name: str, condition: str = "") -> list[Any]:
    """Return all versions of a registered model, or those that meet ``condition`` too."""
    # MLflow's filters know no escape: a name is put between the quotes that it does not hold, and one that holds both is looked for here.
    quote = "'" if "'" not in name else '"' if '"' not in name else ""
    clauses = [f"name = {quote}{name}{quote}"] if quote else []
    wanted = " and ".join(clauses + ([condition] if condition else []))
    found, token = [], None
    while True:
        page = client.search_model_versions(wanted or None, max_results=1000, page_token=token)
        found += [version for version in page if version.name == name]
        token = page.token
        if not token:
            return found


class AwayError(UserError):
    """The registry did not answer, which may pass: the same may be asked again."""


def _refusal(error: Exception, message: str) -> UserError:
    """Return the error to raise: whether to try again depends on whether MLflow says no or says nothing."""
    says_no = isinstance(error, MlflowException) and 400 <= error.get_http_status_code() < 500
    passes = not says_no or error.get_http_status_code() in (408, 429)  # type: ignore[attr-defined]
    return AwayError(message) if passes else UserError(message)


def find_alias(client: MlflowClient, name: str, alias: str) -> Any:
    """Return the version with the alias, or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        why = one_line(why_not(error), 120)
        raise _refusal(error, f"model registry: does not answer ({why}); check MLFLOW_TRACKING_URI") from None


def find_champion(client: MlflowClient, name: str) -> Any:
    """Return the version with the alias champion, or None."""
    return find_alias(client, name, CHAMPION)


def described(client: MlflowClient, name: str, version: str) -> dict[str, Any]:
    """Return {"name", "version", "aliases"}."""
    found = client.get_model_version(name, version)
    return {"name": name, "version": int(version), "aliases": sorted(found.aliases)}


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what MLflow raises where it is away, or refuses, into one line for the user."""
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, ConnectionError) as error:
        where, why = shown_uri(uri), one_line(why_not(error), 160)
        raise _refusal(
            error,
            f"MLflow at {where}: does not answer as it should ({why}); check that it runs, and MLFLOW_TRACKING_URI, and try again",
        ) from None


# ---- a decision ------------------------------------------------------------------------------------------------------------------


def settle(
    client: MlflowClient,
    name: str,
    version: str,
    decide: Callable[[Any], dict[str, Any]],
    lease: float = LEASE,
) -> dict[str, Any]:
    """Decide, in its turn, whether a version becomes champion; set aliases and tags, and return the decision.

    ``decide`` gets the champion as it is in this turn, or None, and returns a Decision: {"promoted", "reasons", "rules", ...}. It is called
    again where somebody has set the alias by hand meanwhile. Where another process takes the same version over, its decision is returned.
    """
    while True:
        try:
            with turn(client, name, version, lease) as holds:
                while True:
                    champion = find_champion(client, name)
                    if (
                        _number(champion) == version
                    ):  # set by hand meanwhile, or by a try that was killed right after it
                        return complete_promotion(client, champion)
                    decision = decide(champion)
                    if not holds():
                        raise DisplacedError
                    if _number(find_champion(client, name)) == _number(champion):
                        apply(client, name, version, champion, decision)
                        return decision
        except DisplacedError:
            theirs = _follow(client, name, version, lease)
            if theirs is not None:
                return theirs


def apply(client: MlflowClient, name: str, version: str, champion: Any, decision: dict[str, Any]) -> None:
    """Make a decision true, in an order that leaves a retry able to go on from anywhere."""
    for rule in decision.get("rules", []):
        if rule["passed"] is not None:  # the decision has them all; tags are what MLflow's page has room for
            said = "passed" if rule["passed"] else "failed"
            client.set_model_version_tag(name, version, f"{GATE}.{rule['rule']}", said)
    client.set_model_version_tag(name, version, DECISION, decision_text(decision))
    if not decision["promoted"]:
        client.set_registered_model_alias(name, CHALLENGER, version)
        client.set_model_version_tag(name, version, GATE, REFUSED)
        return
    if champion is not None and _number(champion) != version:
        client.set_registered_model_alias(name, PREVIOUS, _number(champion))
    # A rollback that was killed and never finished is nobody's wish any more.
    client.delete_registered_model_tag(name, ROLLBACK)
    client.set_registered_model_alias(name, CHAMPION, version)
    complete_promotion(client, client.get_model_version(name, version))


def complete_promotion(client: MlflowClient, champion: Any) -> dict[str, Any]:
    """Do what is left of a promotion once the alias is set; return the decision that led to it."""
    version = _number(champion)
    if CHALLENGER in champion.aliases:
        client.delete_registered_model_alias(champion.name, CHALLENGER)
    if champion.tags.get(GATE) != PROMOTED:
        client.set_model_version_tag(champion.name, version, GATE, PROMOTED)
    kept = kept_decision(champion)
    return (
        kept
        if kept.get("promoted")
        else {"promoted": True, "reasons": ["the alias champion was set by hand"], "rules": []}
    )


def decision_text(decision: dict[str, Any]) -> str:
    """Return a decision as JSON that fits into a tag: the policy goes first, then the rules' figures, then the longest reasons."""
    shorter = dict(decision)
    bare = [{k: v for k, v in rule.items() if k in ("rule", "passed")} for rule in decision.get("rules", [])]
    changes: list[dict[str, Any]] = [
        {},
        {"policy": None},
        {"rules": [{k: v for k, v in rule.items() if k != "figures"} for rule in decision.get("rules", [])]},
        {"rules": bare},
        {"reasons": [one_line(reason, 300) for reason in decision["reasons"][:8]]},
        {"rules": []},
    ]
    for change in changes:
        shorter |= change
        text = json.dumps(shorter, ensure_ascii=False, default=str)
        if len(text) <= LONGEST_DECISION:
            return text
    return json.dumps({"promoted": decision["promoted"], "reasons": [one_line("; ".join(decision["reasons"]), 2000)]})


def kept_decision(version: Any) -> dict[str, Any]:
    """Return the decision in a version's tags; {} if there is none."""
    with contextlib.suppress(ValueError):
        found = json.loads(version.tags.get(DECISION) or "{}")
        if isinstance(found, dict) and isinstance(found.get("reasons"), list):
            return found
    return {}


# ---- turns -----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def turn(client: MlflowClient, name: str, version: str, lease: float = LEASE) -> Iterator[Callable[[], bool]]:
    """Wait for the version's turn to be decided; yield a function that says whether it still is. GATE, set, ends it.

    Raises:
        DisplacedError: another process decides on this very version.
    """
    owner = uuid.uuid4().hex[:12]
    found = client.get_model_version(name, version)
    client.set_model_version_tag(name, version, OWNER, owner)  # a retry takes over from a try that may be dead or not
    with _heartbeat(client, name, version, owner, lease / 6):
        try:
            if found.tags.get(GATE) != WAITING or is_abandoned(found):
                _take_ticket(client, name, version)
            _wait(client, name, version, owner, lease)
            yield lambda: _holds(client.get_model_version(name, version), owner)
        except DisplacedError:
            raise
        except BaseException:  # those behind need not wait for the lease
            with contextlib.suppress(Exception):
                mine = client.get_model_version(name, version)
                if _holds(mine, owner):
                    client.set_model_version_tag(name, version, ABANDONED, _ticket(mine))
            raise


def place(version: Any) -> Place:
    """Return the place of a version in the queue: by its ticket tag, "TICKET.AGAIN", else by its number."""
    number = int(version.version)
    try:
        ticket, again = (int(part) for part in version.tags[TICKET].split("."))
    except (KeyError, ValueError):
        return Place(number, 0, number)
    return Place(ticket, again, number)


def is_abandoned(version: Any) -> bool:
    """Whether somebody has given up waiting for the version; with another ticket it is waited for again."""
    return bool(version.tags.get(ABANDONED) == _ticket(version))


def _ticket(version: Any) -> str:
    ticket, again, _ = place(version)
    return f"{ticket}.{again}"


def _holds(version: Any, owner: str) -> bool:
    tags = version.tags
    return tags.get(GATE) == WAITING and tags.get(OWNER) == owner and not is_abandoned(version)


def _queue(client: MlflowClient, name: str) -> dict[str, Any]:
    return {_number(version): version for version in search(client, name, f"tags.`{GATE}` = '{WAITING}'")}


def _take_ticket(client: MlflowClient, name: str, version: str) -> None:
    """Stand behind everybody who waits. What comes later has a higher number, and sees this ticket."""
    mine = place(client.get_model_version(name, version))
    while True:
        last = max([mine, *_others(client, name, version)])
        mine = Place(last.ticket, last.again + 1, int(version))
        client.set_model_version_tag(name, version, TICKET, f"{mine.ticket}.{mine.again}")
        client.set_model_version_tag(name, version, GATE, WAITING)
        if all(other < mine for other in _others(client, name, version)):
            return


def _others(client: MlflowClient, name: str, version: str) -> list[Place]:
    return [place(found) for number, found in _queue(client, name).items() if number != version]


def _wait(client: MlflowClient, name: str, version: str, owner: str, lease: float) -> None:
    """Return when nobody with a lower ticket is waited for."""
    watches: dict[str, _Watch] = {}
    while True:
        queue = _queue(client, name)
        mine = queue.get(version)
        if mine is None or mine.tags.get(OWNER) != owner:
            raise DisplacedError
        if is_abandoned(mine):
            _take_ticket(client, name, version)
            continue
        ahead = [v for v in queue.values() if place(v) < place(mine) and not is_abandoned(v)]
        if not ahead:
            return
        for one in ahead:
            if watches.setdefault(_number(one), _Watch(lease)).stands_still(one):
                with contextlib.suppress(MlflowException):  # somebody has deleted it
                    client.set_model_version_tag(name, _number(one), ABANDONED, _ticket(one))
        # The more there are before it, the less it asks: asked by fifty once a second, a server does nothing else, and each turn takes longer.
        time.sleep(min(0.05 + 0.15 * len(ahead), lease / 8))


def _follow(client: MlflowClient, name: str, version: str, lease: float) -> dict[str, Any] | None:
    """Wait for the decision of the process that has taken a version over; None if there will be none."""
    watch = _Watch(lease)
    while True:
        found = client.get_model_version(name, version)
        if found.tags.get(GATE) in (PROMOTED, REFUSED):
            return kept_decision(found) or {"promoted": found.tags[GATE] == PROMOTED, "reasons": [], "rules": []}
        if is_abandoned(found) or watch.stands_still(found):
            return None
        time.sleep(min(0.5, lease / 8))


class _Watch:
    """Tells whether a version's heartbeat stands still. A pause between two looks counts for little: the server may have been away."""

    def __init__(self, lease: float) -> None:
        self.lease, self.still, self.said, self.looked = lease, 0.0, ("",), time.monotonic()

    def stands_still(self, version: Any) -> bool:
        now, said = time.monotonic(), tuple(version.tags.get(key, "") for key in (TICKET, OWNER, HEARTBEAT))
        self.still = self.still + min(now - self.looked, self.lease / 4) if said == self.said else 0.0
        self.said, self.looked = said, now
        return self.still > self.lease


@contextlib.contextmanager
def _heartbeat(client: MlflowClient, name: str, version: str, owner: str, pause: float) -> Iterator[None]:
    """Tell, in a thread, that this process lives: it has a tag of its own, so that a late beat undoes no decision."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(pause if count else 0):
            count += 1
            with contextlib.suppress(Exception):  # a server that is away beats for nobody
                client.set_model_version_tag(name, version, HEARTBEAT, f"{owner} {count}")

    thread = threading.Thread(target=beat, daemon=True, name="graftwork-heartbeat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)
        with contextlib.suppress(Exception):  # nobody waits for a version that is decided: what was kept for that goes
            if client.get_model_version(name, version).tags.get(GATE) != WAITING:
                for tag in (OWNER, HEARTBEAT, MADE_BY):
                    client.delete_model_version_tag(name, version, tag)


def _number(version: Any) -> str:
    """Return the number of a version; MLflow's stores give it as text or as an integer. "" for none."""
    return "" if version is None else str(version.version)


# ---- by hand ---------------------------------------------------------------------------------------------------------------------


def promote(client: MlflowClient, name: str, version: str, reason: str) -> str:
    """Make a version champion whatever the gate said; return the former champion's number, or "".

    Raises:
        UserError: there is no such version.
    """
    found = existing(client, name, version)
    if not reason.strip():
        raise UserError("--reason: is empty; say why, for whoever reads the history")
    champion = find_champion(client, name)
    if ROLLED_BACK in found.tags:
        client.delete_model_version_tag(name, version, ROLLED_BACK)
    former = "" if _number(champion) == version else _number(champion)
    apply(client, name, version, champion, {"promoted": True, "reasons": [f"promoted by hand: {reason.strip()}"]})
    return former


def rollback(client: MlflowClient, name: str) -> tuple[str, str]:
    """Give the alias champion back to the version before it; return (the version taken out of service, the one put into it).

    The version taken out is marked, and the gate refuses its weights until it is promoted by hand. Rolling back twice returns.

    Raises:
        UserError: there is no such model, or no champion before the present one.
    """
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        raise _missing(error, name) from None
    champion, previous = (_number(find_alias(client, name, alias)) for alias in (CHAMPION, PREVIOUS))
    begun = tuple(str(model.tags.get(ROLLBACK, "")).split())
    if len(begun) == 2 and champion == begun[1] and previous in begun:  # a try that was killed after the first alias
        out, back = begun
    elif not champion:
        raise UserError(f"model {one_line(name)}: has no champion; give it one with 'graftwork promote'")
    elif not previous or previous == champion:
        raise UserError(
            f"model {one_line(name)}: has no champion before version {champion}; see 'graftwork history', and 'graftwork promote' to choose a version"
        )
    else:
        out, back = champion, previous
    client.set_registered_model_tag(name, ROLLBACK, f"{out} {back}")
    client.set_model_version_tag(name, out, ROLLED_BACK, f"for version {back}")
    client.set_registered_model_alias(name, CHAMPION, back)
    client.set_registered_model_alias(name, PREVIOUS, out)
    if ROLLED_BACK in client.get_model_version(name, back).tags:
        client.delete_model_version_tag(name, back, ROLLED_BACK)
    client.delete_registered_model_tag(name, ROLLBACK)
    return out, back


def history(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """Return what became of each version, the newest first: version, created (ms), aliases, candidate, backbone, accuracy, reason, state.

    Raises:
        UserError: there is no such model.
    """
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        raise _missing(error, name) from None
    aliases: dict[str, list[str]] = {}
    for alias, number in model.aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    return [
        {
            "version": int(found.version),
            "created": int(found.creation_timestamp),
            "aliases": sorted(aliases.get(_number(found), [])),
            "candidate": found.tags.get("graftwork.candidate", ""),
            "backbone": found.tags.get("graftwork.backbone", ""),
            "accuracy": found.tags.get("test_accuracy", ""),
            "reason": "; ".join(str(reason) for reason in kept_decision(found).get("reasons", [])),
            "state": state(found),
        }
        for found in sorted(search(client, name), key=lambda version: -int(version.version))
    ]


def state(version: Any) -> str:
    """Return what became of a version in a word: promoted, refused, waiting, abandoned, rolled back, or by hand."""
    if ROLLED_BACK in version.tags:
        return "rolled back"
    found = version.tags.get(GATE, "by hand")
    return "abandoned" if found == WAITING and is_abandoned(version) else found


def existing(client: MlflowClient, name: str, version: str) -> Any:
    """Return a version.

    Raises:
        UserError: there is none.
    """
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise _missing(error, name, version) from None


def _missing(error: MlflowException, name: str, version: str = "") -> Exception:
    if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
        return error
    if version:
        return UserError(f"model {one_line(name)}: has no version {one_line(version)}; see 'graftwork history'")
    return UserError(f"model {one_line(name)}: the registry has none of this name; see 'graftwork ui'")
