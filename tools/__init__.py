"""Commands for developers. Without this file ``tools`` would be what Detectron2 main installs."""
