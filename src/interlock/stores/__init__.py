"""Where instances, requests and events are kept. A store decides nothing."""
