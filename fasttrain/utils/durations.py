"""Times as users write them."""

import re
from datetime import datetime, timedelta

from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")
_SECONDS = (86400, 3600, 60, 1)
_MOST = 1e9


def seconds_of(text: str, option: str) -> float:
    """The seconds of a duration such as 2h, 90m, 1h30m or 45s. Raises UserError where it is not one above 0."""
    match = _PARTS.fullmatch(text.strip().lower().replace(" ", ""))
    total = (
        sum(float(part) * unit for part, unit in zip(match.groups(), _SECONDS, strict=True) if part) if match else 0.0
    )
    if not 0 < total <= _MOST:
        raise UserError(f"{option} {printable(text)}: give a duration such as 2h, 90m, 1h30m or 45s")
    return total


def seconds_until(text: str, option: str, now: datetime) -> float:
    """The seconds from `now` until a time of day such as 18:30 (the next one) or a date and time such as
    2027-01-31T18:30, in the machine's time zone. Raises UserError where it is neither, or has passed."""
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text.strip()):
            clock = datetime.strptime(text.strip(), "%H:%M" if text.count(":") == 1 else "%H:%M:%S").time()
            until = datetime.combine(now.date(), clock, now.tzinfo)
            until += timedelta(days=until <= now)
        else:
            until = datetime.fromisoformat(text.strip())
            until = until if until.tzinfo else until.astimezone()  # in the machine's time zone on that day
        left = (until - now).total_seconds()
    except (ValueError, OverflowError):
        raise UserError(f"{option} {printable(text)}: give a time such as 18:30 or 2027-01-31T18:30") from None
    if left <= 0:
        raise UserError(f"{option} {printable(text)} has passed")
    if left > _MOST:
        raise UserError(
            f"{option} {printable(text)} is more than {_MOST / 31556952:.0f} years away; give a time such as 18:30"
        )
    return left
