"""Where images come from: folders, manifests, archives and other people's collections."""
