// Package arm knows the contestants: plain forwarding, HAProxy and nginx as the distribution packages them, ours, and
// upstream's gateway. An arm says whether it can run, writes its configuration, starts in a rig and tells the
// load where to connect.
//
// The peers' configurations are meant to be what a careful operator would write, not a straw man: same certificate,
// same key exchanges and cipher, two threads or workers as there are processors, no access log, SNI routing as
// their manuals show it. What is forced and why is said beside the option. Nothing is downloaded or installed.
package arm
