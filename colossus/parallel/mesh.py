"""From a layout to communicators: each rank makes those of its own groups, and knows of no others.

A mesh over all ranks, as torch makes it, takes time and memory with every rank that there is, and start-up waits for
all of them. Here a rank of 200,000 makes ten groups at most, the largest of them its own replica group.
"""

from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colossus.parallel.collectives import Team
from colossus.spec.layout import GROUPS, Coordinates, Group, Layout, Mates, mates


class Mesh:
    """Where this rank stands, and its teams."""

    def __init__(self, layout: Layout, expert_tp: int = 1, *, device: str = "cpu") -> None:
        """Call it on all ranks, after `init_process_group`. The groups of a rank are made in one order everywhere."""
        self.layout, self.expert_tp, self.device = layout, expert_tp, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._teams = {group: self._team(group) for group in GROUPS}

    @cached_property
    def here(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    def mates(self, group: Group) -> Mates:
        return mates(self.layout, self.expert_tp, self.rank, group)

    def team(self, group: Group) -> Team | None:
        """None where this rank is alone in it."""
        return self._teams[group]

    def device_mesh(self, group: Group) -> DeviceMesh:
        """The same team as torch's sharding wants it; this rank must not be alone in it."""
        team = self._teams[group]
        assert team is not None
        return DeviceMesh.from_group(team.process_group, self.device, mesh_dim_names=(group,))

    def axis(self, process_group_name: str) -> Group | None:
        """Which group a process group was made for; for whoever counts what is exchanged."""
        for group, team in self._teams.items():
            if team is not None and team.name == process_group_name:
                return group
        return None

    def _team(self, group: Group) -> Team | None:
        place, ranks = self.mates(group)
        if len(ranks) == 1:
            return None
        made = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=group)
        return Team(group, place, ranks, made)
