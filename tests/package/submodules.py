"""The public modules that an installed taskloom offers; run as a script by the interpreter of another environment too."""

from __future__ import annotations

import pkgutil


def public_submodules() -> list[str]:
    import taskloom

    # pkgutil takes the op libraries, whose names end as an extension module's, for modules.
    names = [module.name for module in pkgutil.walk_packages(taskloom.__path__, "taskloom.")]
    return sorted(name for name in names if not any(part.startswith(("_", "libtaskloom")) for part in name.split(".")))


if __name__ == "__main__":
    print("\n".join(public_submodules()))
