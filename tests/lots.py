"""How pytest-xdist gives tests to processes: lots that stay together, and no end without an end after a crash."""

from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/test_recipe.py", "tests/browser/")      # the tests of such a file run in one process


class Lots(LoadScopeScheduling):
    """Gives lots of tests to processes: the tests of a file in TOGETHER are one lot, each other test is its own.

    When a process dies, its other tests go to a new process. The scheduler of pytest-xdist 3.8 then waits for ever: it
    also hands out the lots that were finished, for which no result can come, and a new process gets a single test,
    although a process only starts a test when it knows the next one.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0] if nodeid.startswith(TOGETHER) else nodeid

    def remove_node(self, node) -> str | None:
        """Forget a process. Returns the test during which it died, which is not tried again, or None."""
        work = self.assigned_work.pop(node)
        left = [(scope, test) for scope, lot in work.items() for test, done in lot.items() if not done]
        if not left:
            return None
        scope, died = left[0]
        work[scope][died] = True
        self.workqueue.update({scope: lot for scope, lot in work.items() if not all(lot.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return died

    def _reschedule(self, node) -> None:
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            if not self.workqueue:
                node.shutdown()                     # after the tests that it still has
                return
            self._assign_work_unit(node)
