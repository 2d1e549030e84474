"""Families of tasks, and the data module that samples episodes from them.

- ``episodes``: what an episode is; :class:`~lightning_maml_guard.tasks.episodes.TaskFamily`, the base class of all
  families. A new family is a subclass with a method ``sample``, in a file of its own.
- ``regression``: linear regression and sinusoids.
- ``images``: Omniglot, miniImageNet and any folder of class folders, on the base class of ``image_family``.
- ``image_files``, ``image_cache``, ``omniglot``: where image files are read from, and the cache of decoded images.
- ``datamodule``: :class:`~lightning_maml_guard.tasks.datamodule.TaskDataModule`.
"""
