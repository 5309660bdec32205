"""Who runs when. Imports no device library and no socket: it is tested on any laptop."""

from edgellm.scheduler.request import Finish, Priority, Request, Timings, Token, Update
from edgellm.scheduler.scheduler import Plan, Scheduler, check_length

__all__ = [
    "Finish",
    "Plan",
    "Priority",
    "Request",
    "Scheduler",
    "Timings",
    "Token",
    "Update",
    "check_length",
]
