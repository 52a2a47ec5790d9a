"""Stage clean: remove this machine's stores of decoded real images."""

from pipeline.data.local import clean, store_root
from pipeline.graph import Action, log


class Clean(Action):
    """Remove this machine's stores of a storage path, and list them."""

    name = "clean"
    writes = False

    def perform(self) -> None:
        """See Action."""
        root = store_root(self.config.storage / "cache", self.config.runtime.local_directory)
        lines = [f"removed {path} ({size / 2**20:,.0f} MiB)" for path, size in clean(root)]
        log("\n".join(lines or [f"no store of real images to remove in {root}"]))
