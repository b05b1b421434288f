"""The way to a Kubeflow Pipelines server: its address, who asks, and what it may answer that is not what was asked for."""

import contextlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from graftwork.errors import UserError, one_line
from graftwork.tracking import shown_uri

PIPELINE = "graftwork-image-classification"
HOST_VARIABLES = ["GRAFTWORK_KFP_HOST", "KFP_HOST", "KF_PIPELINES_ENDPOINT"]  # the last is the SDK's own
TOKEN_VARIABLE = "KFP_TOKEN"  # a token on a command line would be seen by every user of the machine
TIMEOUTS = (10.0, 60.0)  # seconds to connect, and for an answer; the SDK by itself waits for ever
PAGE = 100  # rows in a page of a list
NEAR = (
    "give the address of KFP's API or of its page, as http://localhost:8080 after "
    "'kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80'"
)

Host = Annotated[
    str,
    typer.Option(
        envvar=HOST_VARIABLES,
        help="Address of Kubeflow Pipelines, its API or its page; https://HOST/pipeline in Kubeflow.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help=f"File with a bearer token, read again whenever it is needed. Or set {TOKEN_VARIABLE}."),
]
ServiceAccount = Annotated[
    bool,
    typer.Option("--service-account", help="Inside a cluster: use the pod's own token for pipelines.kubeflow.org."),
]
Namespace = Annotated[str, typer.Option(help="Profile of the user, where KFP is for several. Default: KFP's own.")]
CertificateFile = Annotated[
    Path | None, typer.Option("--ca-file", help="PEM file of the authority that signed the server's certificate.")
]


class Cluster(NamedTuple):
    """A server that has answered, and the client that speaks with it."""

    client: Any  # kfp.Client
    host: str
    namespace: str | None  # None: the server is for one user


@contextlib.contextmanager
def cluster_at(
    host: str,
    token_file: Path | None = None,
    service_account: bool = False,
    namespace: str = "",
    certificate_file: Path | None = None,
) -> Iterator[Cluster]:
    """Yield the server at ``host``; what it refuses within is one line.

    Raises:
        UserError: it cannot be reached, refuses, or does not speak the API v2beta1.
    """
    address = checked_address(host)
    token = checked_token(token_file, service_account)
    if certificate_file is not None and not certificate_file.is_file():
        raise UserError(f"certificate {one_line(certificate_file)}: no such file; give a PEM file with --ca-file")
    with warnings.catch_warnings(), answering(address):
        warnings.simplefilter("ignore")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of each second try, on stderr
        import kfp
        import kfp_server_api
        from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

        credentials = None
        if token_file is not None:
            credentials = ServiceAccountTokenVolumeCredentials(str(token_file))
        elif service_account:
            credentials = ServiceAccountTokenVolumeCredentials()
        settings = kfp_server_api.Configuration(host=address)
        settings.retries = 1
        settings.ssl_ca_cert = str(certificate_file) if certificate_file else None
        if token or credentials:
            settings.api_key, settings.api_key_prefix = {"authorization": token}, {"authorization": "Bearer"}
            settings.refresh_api_key_hook = credentials.refresh_api_key_hook if credentials else None
        several_users = probe(kfp_server_api.ApiClient(settings), address, bool(token or credentials))
        try:
            client = quietly(
                kfp.Client,
                host=address,
                existing_token=token or None,
                credentials=credentials,
                ssl_ca_cert=settings.ssl_ca_cert,
                **({"namespace": namespace} if namespace else {}),
            )
        except json.JSONDecodeError as error:
            raise UserError(
                f"{kfp.Client._LOCAL_KFP_CONTEXT}: the SDK's own settings are no JSON ({one_line(error, 80)}); mend or delete the file"
            ) from None
        bound_requests(client)
        known = namespace or client.get_user_namespace() or ""
        if several_users and not known:
            raise UserError(f"{address}: serves several users; give your profile with --namespace")
        yield Cluster(client, address, known or None)


def checked_address(host: str) -> str:
    """Return ``host`` as an address that begins with a scheme and ends without a slash."""
    text = host.strip()
    if not text:
        raise UserError(f"--host: is not given; {NEAR}, or set {HOST_VARIABLES[0]}")
    if "://" not in text:
        text = ("http://" if re.match(r"(localhost|127\.|\[::1\])", text) else "https://") + text
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?(/?#/.*)?", text):
        raise UserError(f"--host {one_line(shown_uri(text))}: is no address; {NEAR}")
    if "@" in text.split("/")[2]:
        raise UserError(
            f"--host {one_line(shown_uri(text))}: holds a password, which others would read; leave it out, and give a token with "
            f"--token-file or {TOKEN_VARIABLE}"
        )
    return text.split("#")[0].rstrip("/")


def checked_token(token_file: Path | None, service_account: bool) -> str:
    """Return the token of the environment, where no file is given; look whether the file can be read."""
    if token_file is not None and service_account:
        raise UserError("--token-file and --service-account: give one of them")
    path = token_file
    if service_account:
        from kfp import client

        path = Path(os.environ.get(client.KF_PIPELINES_SA_TOKEN_ENV) or client.KF_PIPELINES_SA_TOKEN_PATH)
    if path is None:
        return checked_words(os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        outside = "; outside a cluster give --token-file" if service_account else "; give the file with the token"
        raise UserError(f"token file {one_line(path)}: cannot be read ({why}){outside}") from None
    if not checked_words(text, f"token file {one_line(path)}"):
        raise UserError(f"token file {one_line(path)}: is empty; write the token into it")
    return ""


def checked_words(text: str, where: str) -> str:
    token = text.strip()
    if not all("!" <= character <= "~" for character in token):
        raise UserError(f"{where}: holds more than one word, and so no token; write the token alone")
    return token


def probe(api: Any, host: str, with_token: bool) -> bool:
    """Ask whether a KFP of API v2beta1 answers, and return whether it serves several users."""
    import kfp_server_api

    service = kfp_server_api.HealthzServiceApi(api)
    try:
        health, _, headers = service.healthz_service_get_healthz_with_http_info(_request_timeout=TIMEOUTS)
    except kfp_server_api.ApiException as error:
        if error.status == 404:
            raise UserError(f"{host}: {older(api)}") from None
        raise
    if "json" not in str(headers.get("content-type", "")):
        login = "the token is not taken" if with_token else f"give a token with --token-file or {TOKEN_VARIABLE}"
        raise UserError(
            f"{host}: answers with a web page and not as KFP's API; if it is a login, {login}; within Kubeflow the address ends with /pipeline"
        )
    return bool(health.multi_user)


def older(api: Any) -> str:
    """Say what stands at an address that does not know the API v2beta1."""
    try:
        answer = api.call_api(
            "/apis/v1beta1/healthz", "GET", response_type="object", auth_settings=["Bearer"], _request_timeout=TIMEOUTS
        )
        version = answer[0].get("tag_name") or "1"
    except Exception:
        return f"there is no Kubeflow Pipelines; {NEAR}, within Kubeflow with /pipeline at its end"
    return f"its Kubeflow Pipelines ({one_line(version, 40)}) has no API v2beta1, which came with KFP 2.0; update it to 2.17 or newer"


def bound_requests(client: Any) -> None:
    """Give every request of the client a time by which it must be answered."""
    rest = client.runs.run_service_get_run.__self__.api_client.rest_client
    request = rest.request

    def bounded(*args: Any, _request_timeout: Any = None, **options: Any) -> Any:
        return request(*args, _request_timeout=_request_timeout or TIMEOUTS, **options)

    rest.request = bounded


def quietly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of the SDK, which prints links of its own."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **options)


# ---- what goes wrong -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(host: str, what: str = "") -> Iterator[None]:
    """Turn what the server, or the way to it, refuses into one line that says ``what`` was refused."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise UserError(refusal(host, what, error)) from None
    except HTTPError as error:
        raise UserError(f"{host}: {unreachable(error)}") from None
    except (AttributeError, TypeError, ValueError) as error:
        if type(error).__module__ == "builtins" and not came_from("kfp_server_api", error):
            raise
        raise UserError(
            f"{host}: {what + ': ' if what else ''}gave an answer that KFP's client cannot read ({one_line(error, 120)}); is it KFP 2?"
        ) from None


def came_from(package: str, error: BaseException) -> bool:
    """Whether ``error`` was raised within ``package``."""
    trace, last = error.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return last.split(".")[0] == package


def refusal(host: str, what: str, error: Any) -> str:
    """Return the line for a status that is an error."""
    said, start = server_message(error), f"{host}: " + (f"{what}: " if what else "")
    status = error.status
    if status == 401:
        return f"{start}the login is not taken (401); give a token that is not out of date with --token-file or {TOKEN_VARIABLE}"
    if status == 403:
        return f"{start}not allowed (403{': ' + said if said else ''}); give another --namespace, or ask for the role kubeflow-edit there"
    if status == 404:
        return (
            f"{start}not found (404{': ' + said if said else ''}); see 'graftwork status' and 'graftwork schedule list'"
        )
    if status == 409:
        return f"{start}there is one of this name already (409{': ' + said if said else ''}); give another name"
    if status and status >= 500:
        why = f"{status}{': ' + said if said else ''}"
        return f"{start}the server failed ({why}); try again, or look with 'kubectl logs -n kubeflow deployment/ml-pipeline'"
    return f"{start}refused ({status}{': ' + said if said else ''})"


def server_message(error: Any) -> str:
    """Return the one sentence of a KFP error that is for people."""
    body = error.body or ""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        told = json.loads(text)
        text = told.get("message") or told.get("error_message") or told.get("error") or ""
        text = text if isinstance(text, str) else str(text.get("message", ""))
    except (ValueError, AttributeError):
        text = "" if "<" in text else text
    return one_line(shown_uri(text.strip().split("\n")[0].rstrip(". ")), 300)


def unreachable(error: Exception) -> str:
    """Return why nothing answers, from the innermost of urllib3's reasons."""
    from urllib3 import exceptions

    reason: Any = error
    while getattr(reason, "reason", None) is not None and isinstance(reason.reason, Exception):
        reason = reason.reason
    text = str(reason)
    if isinstance(reason, exceptions.SSLError) or "CERTIFICATE" in text or "SSL" in text:
        why = (
            "its certificate is not trusted; give its authority with --ca-file"
            if "CERTIFICATE" in text
            else "it does not speak TLS; try http://"
        )
        return f"cannot be reached: {why}"
    if isinstance(reason, exceptions.NameResolutionError):
        return f"cannot be reached: there is no host of this name; {NEAR}"
    if "refused" in text:
        return f"cannot be reached: nothing listens there; {NEAR}"
    # "No connection" is a kind of time-out to urllib3.
    if isinstance(reason, exceptions.TimeoutError) and not isinstance(reason, exceptions.NewConnectionError):
        return f"does not answer in time; {NEAR}"
    return f"cannot be reached ({one_line(text.rpartition(': ')[2], 120)}); {NEAR}"


# ---- what it holds ---------------------------------------------------------------------------------------------------------------------


def pages(fetch: Callable[..., Any], rows: str, limit: int = 10_000, **options: Any) -> Iterator[Any]:
    """Yield the rows of a list of KFP's, page by page."""
    token, seen = "", 0
    while seen < limit:
        page = fetch(page_token=token, page_size=min(PAGE, limit - seen), **options)
        for row in getattr(page, rows) or []:
            seen += 1
            yield row
        token = page.next_page_token or ""
        if not token:
            return


def equals(key: str, value: str) -> str:
    """Return a filter of KFP's lists."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def find_named(fetch: Any, rows: str, name: str, **options: Any) -> Any:
    return next(iter(pages(fetch, rows, filter=equals("display_name", name), **options)), None)


def our_pipeline(cluster: Cluster) -> str:
    """Return the id of our pipeline; empty where the server has never had it."""
    found = find_named(cluster.client.list_pipelines, "pipelines", PIPELINE, namespace=cluster.namespace)
    return str(found.pipeline_id) if found else ""


def is_of(row: Any, pipeline: str) -> bool:
    """Whether a run or a schedule is of the pipeline of this id."""
    reference = row.pipeline_version_reference
    return bool(pipeline and reference and reference.pipeline_id == pipeline)
