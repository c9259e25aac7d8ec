"""What a process does with durable calls: submit them, wait for their ends, and reach any of them by its id."""

from collections.abc import Callable

from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.records import Records
from qserve.broker.refusals import FullQueues
from qserve.durable.by_id import CallsById
from qserve.durable.submitting import Submissions
from qserve.durable.watching import Watchers
from qserve.settings import Settings
from qserve.wire.messages import Signer


class DurableCalls:
    """The durable calls of one client. Belongs to its event loop.

    Args:
        submissions_of: Finds the submissions of this process to the shard in which a call lies.

    Attributes:
        by_id: Reads and ends calls.
        watchers: Those who wait for the ends of calls.
        submissions: Submits calls.
        confirms_at_once: Whether calls are submitted and cancelled without waiting for anybody, on the loop, too.
    """

    confirms_at_once = False

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        payloads: Payloads,
        process: str,
        link: Link,
        full_queues: FullQueues,
        submissions_of: Callable[[str], Submissions],
    ) -> None:
        records = Records(settings.keys)
        self.by_id = CallsById(records, settings.keys, signer, link)
        self.watchers = Watchers(records, payloads, self.by_id, process, link)
        self.submissions = Submissions(
            *(settings, signer, records, payloads, process, link),
            full_queues=full_queues,
            watchers=self.watchers,
            of_call=submissions_of,
        )

    def link_up(self) -> None:
        """Submit again what is not confirmed, and ask for outcomes, because there is a new connection."""
        self.submissions.link_up()
        self.watchers.look_at_all(but=self.submissions.unconfirmed)

    def link_down(self) -> None:
        """Tell those who submit that Redis has been away for too long."""
        self.submissions.link_down()

    def tick(self) -> None:
        """Look for outcomes that were missed. To be called once a second."""
        self.watchers.tick(but=self.submissions.unconfirmed)

    def stop(self) -> None:
        """Stop to submit and to wait. The calls themselves go on."""
        self.submissions.stop()
        self.watchers.stop()
