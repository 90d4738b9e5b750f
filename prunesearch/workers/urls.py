"""Storage URLs: variables filled in, secrets recognised, and texts from which every secret is removed."""

import json
import os
import re
from urllib.parse import quote, quote_plus

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from prunesearch.study.errors import StudyError

FORMS = (
    "postgresql+psycopg://user@host/db, mysql+pymysql://…, grpc://host:port, journal:///path/journal.log or sqlite:///study.db"
)
VARIABLE = re.compile(r"\$\{?\w+\}?")
SECRET_KEYS = ("password", "passwd", "pass", "pwd", "sslpassword")

_known_secrets: set[str] = set()  # of the URLs that this process has opened


def filled_in(url: str) -> str:
    """The URL with its ${VARIABLES} replaced; a password may hold any character. Raises StudyError if it is no URL."""
    url = os.path.expandvars(url) if VARIABLE.fullmatch(url) else url
    try:
        if "://" not in url:
            raise ArgumentError
        parsed = make_url(url)
        expand = os.path.expandvars
        parsed = parsed.set(
            username=parsed.username and expand(parsed.username),
            password=parsed.password and expand(str(parsed.password)),
            host=parsed.host and expand(parsed.host),
            database=parsed.database and expand(parsed.database),
        )
    except (ArgumentError, ValueError):
        raise StudyError([f"storage.url: must be a URL, such as {FORMS}, got {shown(url)}"]) from None
    written = [parsed.password, *(v for k, v in parsed.query.items() if k.lower() in SECRET_KEYS)]
    _known_secrets.update(str(secret) for secret in written if secret)
    return parsed.render_as_string(hide_password=False)


def holds_secret(url: str) -> bool:
    """Whether a password is written in the URL itself, instead of the name of an environment variable."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return "@" in url
    in_query = any(key.lower() in SECRET_KEYS and value for key, value in parsed.query.items())
    return in_query or (bool(parsed.password) and not VARIABLE.fullmatch(str(parsed.password)))


def shown(url: str) -> str:
    """The URL as it may be printed: without its password and its options."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url.split("://")[0] + "://…" if "@" in url or "://" in url else repr(url)
    return parsed.set(query={}).render_as_string(hide_password=True)


def _written_forms(secret: str) -> set[str]:
    """How a message may write a secret: as it is, quoted as in a URL (SQLAlchemy leaves spaces), or as Python, JSON and libpq
    write it between quotation marks.
    """
    in_url = {quote(secret, safe=""), quote(secret, safe=" +"), quote_plus(secret)}
    in_json = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    in_libpq = secret.replace("\\", "\\\\").replace("'", "\\'")
    return {secret, repr(secret)[1:-1], in_libpq, *in_url, *in_json}


def redacted(text: str) -> str:
    """The text without secrets: what a database driver says may repeat the URL that it was given.

    Removes the passwords of the URLs that this process has opened, the one in PGPASSWORD, and any text in the place where a URL
    or a connection string has its password.
    """
    known = {*_known_secrets, os.environ.get("PGPASSWORD", "")} - {""}
    for written in sorted({form for secret in known for form in _written_forms(secret)}, key=len, reverse=True):
        text = text.replace(written, "***")
    text = re.sub(r"(\w[\w+.-]*://[^\s:/@]*):[^\s@]*@", r"\1:***@", text)
    return re.sub(rf"\b({'|'.join(SECRET_KEYS)})=('(?:\\.|[^'\\])*'|\"[^\"]*\"|[^\s&;]+)", r"\1=***", text, flags=re.IGNORECASE)


def first_line(error: BaseException) -> str:
    """The first line of what an error or its cause says, with the kind of error in front and secrets removed."""
    cause = error.__cause__ or error
    text = str(cause).strip()
    return redacted(f"{type(cause).__name__}: {text.splitlines()[0] if text else ''}".removesuffix(": "))
