"""Networks of a host: bridges, taps, DHCP servers and packet filters, brought to what its guests need.

`host_networks` is the entry; `packet_filter` has the rules, as pure functions.
"""
