# The test's stand-in for nvidia/cuda on Ubuntu, on top of a plain Debian: what differs there and has
# broken Dockerfiles is here too. No registry is needed.
ARG BASE_IMAGE
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Uid 1000 is taken; CUDA's folder is there and has no compiler; dpkg does not wait for the disk.
RUN useradd --create-home --uid 1000 ubuntu \
    && mkdir -p /usr/local/cuda/lib64 \
    && echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/unsafe-io \
    && printf '#!/bin/bash\necho "== CUDA =="\nexec "$@"\n' >/opt/entrypoint.sh \
    && chmod +x /opt/entrypoint.sh
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/cuda/lib64 \
    PATH=/usr/local/cuda/bin:$PATH
ENTRYPOINT ["/opt/entrypoint.sh"]
