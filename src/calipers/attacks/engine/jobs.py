"""Bookkeeping of jobs: which points are decided, which jobs still matter.

Kept by the host in plain numbers.
"""

from __future__ import annotations


class Book:
    """The jobs of `points` points, `ranks` of them each.

    A rank is a restart, then a target. Job number = rank x points + point, so that all points come
    before the next rank.
    """

    def __init__(self, points: int, ranks: int) -> None:
        self.points, self.ranks = points, ranks
        self.next_job = 0
        self.running: list[set[int]] = [set() for _ in range(points)]
        self.left = [ranks] * points
        self.winner: list[int] = [ranks] * points  # the lowest successful rank, `ranks` if none
        self.decided = [False] * points

    def draw(self, count: int) -> list[int]:
        """Return up to `count` jobs that can still matter.

        Lowest rank first over all points.
        """
        jobs: list[int] = []
        while len(jobs) < count and self.next_job < self.points * self.ranks:
            rank, point = divmod(self.next_job, self.points)
            if rank < self.winner[point]:
                jobs.append(self.next_job)
                self.running[point].add(rank)
            self.next_job += 1
        return jobs

    def finish(self, job: int, success: bool) -> bool:
        """Note a job's end.

        Return whether its candidate is now the point's best by rank.
        """
        rank, point = divmod(job, self.points)
        self.running[point].discard(rank)
        self.left[point] -= 1
        if success and rank < self.winner[point]:
            self.winner[point] = rank
            return True
        return False

    def moot(self, job: int) -> bool:
        """Return whether a job of lower rank has succeeded already."""
        rank, point = divmod(job, self.points)
        return self.winner[point] < rank

    def settle(self, point: int) -> bool:
        """Return True once, when the outcome of a point is final.

        That is when nothing that could change it is left.
        """
        pending = self.running[point] or (self.winner[point] == self.ranks and self.left[point])
        if self.decided[point] or pending:
            return False
        self.decided[point] = True
        return True
