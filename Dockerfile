# GPU image with everything that dreamer_wb needs: ./start.sh builds it, starts it and opens a shell inside.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime

ENV DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1 \
    MPLBACKEND=Agg \
    SDL_VIDEODRIVER=dummy

RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY . .
# torch is in the image: pip keeps it, because the requirements are open upward
RUN pip install --no-cache-dir -e ".[video,wandb]"

CMD ["bash"]
