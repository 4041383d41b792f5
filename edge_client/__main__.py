"""Run the `edge-client` command: `python -m edge_client`."""

from edge_client.cli import main

if __name__ == "__main__":
    main()
