"""An endpoint in the shape of OpenAI's API: chat completions, completions and models, on the page's own server.

`requests` has the bodies that clients send, `service` answers them, `answers` has the JSON of the answers, and `routes`
is the web application. The libraries for this, starlette and pydantic, come with gradio.
"""

from cascadeexit.openai.routes import application

__all__ = ["application"]
