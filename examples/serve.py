"""Serve PNG files over HTTP, as /?prompt=red+heart&seed=7: python examples/serve.py [MODEL] [PORT]"""

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

from ldm import LDMPipeline


def build_server(model: str = "models/emoji", port: str = "8000") -> HTTPServer:
    pipe = LDMPipeline.from_pretrained(model).to_best_device()

    class Handler(BaseHTTPRequestHandler):  # one request after the other: a pipeline generates one batch at a time
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            try:
                picture = pipe(query["prompt"][0], seed=int(query.get("seed", "0")[0])).images[0]
            except (KeyError, ValueError) as error:
                return self.send_error(400, explain=str(error))
            self.send_response(200)
            self.end_headers()
            picture.save(self.wfile, "PNG")

    return HTTPServer(("127.0.0.1", int(port)), Handler)


if __name__ == "__main__":
    build_server(*sys.argv[1:]).serve_forever()
