#!/bin/sh
# Builds the image, starts the container, opens a shell in it. Without an NVIDIA GPU: ./start.sh cpu
set -e
cd "$(dirname "$0")"

if docker compose version >/dev/null 2>&1; then compose="docker compose"
elif command -v docker-compose >/dev/null 2>&1; then compose="docker-compose"
else echo "start.sh: Docker Compose not found; install Docker from https://docs.docker.com/get-docker/" >&2; exit 1; fi

case "${1:-gpu}" in
    gpu) files="-f docker-compose.yml" ;;
    cpu) files="-f docker-compose.yml -f docker-compose.cpu.yml" ;;
    *) echo "usage: ./start.sh [gpu|cpu]" >&2; exit 2 ;;
esac

$compose $files up -d --build
echo "inside: dreamer-wb lpm steps=10000 noisy_tv=true    (or: python3 train_lpm.py --steps 10000 --noisy-tv)"
echo "leave with exit; stop the container with: $compose down"
exec $compose $files exec dreamer bash
